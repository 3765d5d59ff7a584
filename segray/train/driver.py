"""From a configuration to a bundle: claim the output, check the labels, fit, keep the best epoch."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from segray.bundle import has_bundle
from segray.classes import ClassMap
from segray.cluster import connect_ray
from segray.config import TrainConfig
from segray.errors import RunMismatchError
from segray.manifest import Sample, Splits, load_splits
from segray.models import check_model_names
from segray.progress import build_bar
from segray.storage import exists, join_uri, normalize_uri, read_bytes, write_bytes
from segray.train.checkpoint import RUN_NAME, list_checkpoints
from segray.train.labels import LabelReport, check_dataset, require_learnable

_SETTINGS_FILE = "train.json"  # under the output: the settings that its checkpoints come from


def run_training(config: TrainConfig, console: Console) -> str:
    """Train and return the URI of the bundle; a run that was interrupted goes on, a finished one is found finished.

    Raises:
        SegrayError: The input is unusable, the output belongs to another run, the loss is not finite, or workers were
            lost more often than allowed.
    """
    check_model_names(config.model)
    splits = load_splits(config.data)
    output = normalize_uri(config.output)
    bundle_uri = join_uri(output, "bundle")
    _require_same_run(config, output)
    console.print(describe_run(config, splits), highlight=False)
    if has_bundle(bundle_uri):
        console.print("this run is complete; nothing to do", highlight=False)
        return bundle_uri
    classes = get_classes(config)
    with connect_ray(config.train.num_train_workers if config.train.use_gpu else 0):
        for name, samples in splits._asdict().items():
            require_learnable(check_labels(samples, classes, name, console), name)
        write_bytes(join_uri(output, _SETTINGS_FILE), json.dumps(config.of_weights, indent=2).encode())
        from segray.train.fit import fit, write_bundle  # 8 s of imports: not before the labels have been looked at

        fit(config, classes, splits, output, console)
        with console.status("writing the bundle"):
            write_bundle(config, classes, splits, output, bundle_uri, console)
    return bundle_uri


def get_classes(config: TrainConfig) -> ClassMap:
    """Return the classes that a configuration declares."""
    return ClassMap(config.data.class_names, config.data.class_values, config.data.ignore_values)


def _require_same_run(config: TrainConfig, output: str) -> None:
    """Refuse an output folder whose finished epochs come from other settings.

    Raises:
        RunMismatchError: Names the first setting that differs.
    """
    uri = join_uri(output, _SETTINGS_FILE)
    if exists(uri) and list_checkpoints(join_uri(output, RUN_NAME)):
        difference = find_difference(json.loads(read_bytes(uri)), config.of_weights)
        if difference:
            raise RunMismatchError(f"{output} holds a run with other settings ({difference}); choose another output")


def find_difference(theirs: Any, mine: Any, path: str = "") -> str | None:
    """Return the first setting that differs between two resolved configurations, as ``name: there … , here …``."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted(theirs.keys() | mine.keys()):
            difference = find_difference(theirs.get(name), mine.get(name), f"{path}.{name}" if path else name)
            if difference:
                return difference
        return None
    return None if theirs == mine else f"{path}: there {theirs!r}, here {mine!r}"


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


def run_check(config: TrainConfig, console: Console) -> bool:
    """Check all labels, print each fault and what is labelled; return whether there is none.

    Raises:
        SegrayError: The images and masks cannot be listed or paired, or the store failed.
    """
    splits = load_splits(config.data)
    classes = get_classes(config)
    with connect_ray():
        reports = {name: check_labels(samples, classes, name, console) for name, samples in splits._asdict().items()}
    for fault in [fault for report in reports.values() for fault in report.faults]:
        console.print(str(fault), highlight=False, markup=False)
    table = Table("class", "raw value")
    for name in reports:
        for what in ("pixels", "share", "images"):
            table.add_column(f"{name} {what}", justify="right")
    for index, (class_name, value) in enumerate(zip(classes.names, classes.values, strict=True)):
        cells = [cell for report in reports.values() for cell in _describe_class(report, index)]
        table.add_row(class_name, str(value), *cells)
    console.print(table)
    num_faults = sum(len(report.faults) for report in reports.values())
    num_samples = sum(report.num_samples for report in reports.values())
    console.print(f"{num_samples} images and masks checked, {num_faults} faults", highlight=False)
    return num_faults == 0


def _describe_class(report: LabelReport, index: int) -> tuple[str, str, str]:
    num_px = int(report.pixel_count[index])
    share = num_px / max(1, int(report.pixel_count.sum()))
    return f"{num_px:,}", f"{share:.2%}", str(report.image_count[index])
