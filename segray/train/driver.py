"""From a configuration to a bundle: check the labels, bind the output to the run, fit, keep the best epoch."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from segray.bundle import has_bundle
from segray.classes import ClassMap
from segray.cluster import connect_ray
from segray.config import TrainConfig, find_differences
from segray.errors import RunMismatchError
from segray.manifest import Sample, Splits, Unpaired, load_splits
from segray.models.build import check_model
from segray.models.norms import synchronise_norms
from segray.models.recompute import recompute_encoder
from segray.progress import build_bar
from segray.storage import exists, join_uri, normalize_uri, read_bytes, write_bytes
from segray.train.checkpoint import RUN_NAME, list_checkpoints, remove_surplus
from segray.train.findings import Finding, print_findings, print_warnings
from segray.train.job import TrainJob
from segray.train.labels import LabelReport, check_dataset, conclude, require_labelled, require_learnable
from segray.transforms import Preprocessing

_BINDING_FILE = "train.json"  # under the output: the settings and the listing that its checkpoints come from


def run_training(config: TrainConfig, console: Console) -> str:
    """Train and return the URI of the bundle; a run that was interrupted goes on, a finished one is found finished.

    Raises:
        SegrayError: The input is unusable, the output belongs to another run, the loss is not finite, or workers were
            lost more often than allowed.
    """
    classes = get_classes(config)
    _check_network(config, classes)
    splits = load_splits(config.data)
    output = normalize_uri(config.output)
    bundle_uri = join_uri(output, "bundle")
    binding = {"config": config.of_weights, "listing": splits.compute_sha256()}
    _require_same_run(binding, output, bundle_uri)
    console.print(describe_run(config, splits), highlight=False)
    if has_bundle(bundle_uri):
        console.print("this run is complete; nothing to do", highlight=False)
        return bundle_uri
    preprocessing = Preprocessing.of_encoder(config.model)
    num_workers = config.train.num_train_workers
    with connect_ray(num_workers, num_workers if config.train.use_gpu else 0):
        reports = _check_splits(splits, classes, console)
        for name, report in reports.items():
            require_learnable(report, name)
        print_warnings(reports, console)
        write_bytes(join_uri(output, _BINDING_FILE), json.dumps(binding, indent=2).encode())
        # 8 s of imports: not before the labels have been looked at
        from segray.train.bundling import write_bundle
        from segray.train.fit import fit
        from segray.train.tracking import Tracking

        class_weights = _get_class_weights(config, reports["train"])
        job = TrainJob(config, classes, splits, preprocessing, class_weights, join_uri(output, RUN_NAME))
        tracking = Tracking(config, classes, output, console)
        try:
            fit(job, output, console, tracking.log)
        finally:
            tracking.close()
        with console.status("writing the bundle"):
            write_bundle(job, bundle_uri, console)
        remove_surplus(job.run_uri, config.train.num_best_checkpoints)
    return bundle_uri


def _check_network(config: TrainConfig, classes: ClassMap) -> None:
    """Refuse a network that cannot be had, or cannot do what a setting asks, before anything is read or started."""
    outline = check_model(config.model, classes.num_classes)
    if config.train.sync_batchnorm:
        synchronise_norms(outline, torch.device("cpu"))
    if config.train.gradient_checkpointing:
        recompute_encoder(outline)


def _get_class_weights(config: TrainConfig, report: LabelReport) -> npt.NDArray[np.float64] | None:
    """Return the weights of the classes in the loss, (C,), or None for equal ones."""
    given = config.loss.class_weights
    if given != "auto":
        return None if given is None else np.array(given, np.float64)
    from segray.losses import compute_median_frequency_weights

    return compute_median_frequency_weights(report.pixel_count, report.image_px)


def get_classes(config: TrainConfig) -> ClassMap:
    """Return the classes that a configuration declares."""
    return ClassMap(config.data.class_names, config.data.class_values, config.data.ignore_values)


def _require_same_run(binding: dict[str, Any], output: str, bundle_uri: str) -> None:
    """Refuse an output folder whose finished epochs, or bundle, come from other settings or images.

    Raises:
        RunMismatchError: Names the first difference.
    """
    uri = join_uri(output, _BINDING_FILE)
    if exists(uri) and (has_bundle(bundle_uri) or list_checkpoints(join_uri(output, RUN_NAME))):
        theirs = json.loads(read_bytes(uri))
        differences = find_differences(theirs["config"], binding["config"])
        if theirs["listing"] != binding["listing"]:
            differences.append("another listing: images or masks were added, removed or renamed")
        if differences:
            raise RunMismatchError(f"{output} holds another run ({'; '.join(differences)}); choose another output")


def describe_run(config: TrainConfig, splits: Splits) -> str:
    """Return the first line of output: device, workers, images per split, and classes."""
    settings = config.train
    backend = "" if settings.num_train_workers == 1 else (", nccl" if settings.use_gpu else ", gloo")
    height, width = config.image_size
    names = config.data.class_names
    return (
        f"device {'GPU' if settings.use_gpu else 'CPU'} ({settings.precision}{backend}), "
        f"{settings.num_train_workers} worker{'s' if settings.num_train_workers > 1 else ''}, "
        f"images {len(splits.train)} train + {len(splits.val)} val at {height}x{width}, "
        f"{len(names)} classes: {', '.join(names)}"
    )


def check_labels(samples: Sequence[Sample], classes: ClassMap, split: str, console: Console) -> LabelReport:
    """Check the labels of a split with a progress display."""
    report = LabelReport.empty(classes.num_classes)
    with build_bar(console, "images") as bar:
        task = bar.add_task(f"check {split}", total=len(samples), note="")
        for report in check_dataset(samples, classes):
            bar.update(task, completed=report.num_samples, note=f"{len(report.faults)} faults")
    return report


def _check_splits(splits: Splits, classes: ClassMap, console: Console) -> dict[str, LabelReport]:
    reports = {name: check_labels(samples, classes, name, console) for name, samples in splits._asdict().items()}
    return conclude(reports, splits, classes)


def run_check(
    config: TrainConfig,
    console: Console,
    *,
    list_all: bool = False,
    num_drawn: int | None = None,
    draw_to: str | None = None,
) -> bool:
    """Check all labels, print what is found and what is labelled; return whether there is no fault.

    Args:
        config: Where the labels are, and what their values mean.
        console: What is printed to.
        list_all: Also list what is found beyond the first hundred of a kind.
        num_drawn: Samples to draw as training is fed with them, if there is no fault.
        draw_to: URI of that picture; None: ``augmented.png`` under the output.

    Raises:
        SegrayError: The images and masks cannot be listed or paired, no pixel of a split is labelled, or the store
            failed.
    """
    unpaired: list[Unpaired] = []
    splits = load_splits(config.data, unpaired)
    classes = get_classes(config)
    with connect_ray():
        reports = _check_splits(splits, classes, console)
    faults: list[Finding] = [*unpaired, *(fault for report in reports.values() for fault in report.faults)]
    print_findings(reports, faults, classes, console, list_all)
    if faults:
        return False
    for name, report in reports.items():
        require_labelled(report, name)
    if num_drawn:
        from segray.train.preview import draw_training  # matplotlib and torchvision, which nothing else here needs

        uri = normalize_uri(draw_to) if draw_to else join_uri(normalize_uri(config.output), "augmented.png")
        write_bytes(uri, draw_training(config, splits.train, classes, num_drawn))
        console.print(f"augmented samples: {uri}", highlight=False)
    return True
