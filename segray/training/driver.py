"""Run a complete training: check the labels, train on Ray, and write the bundle of the best epoch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from segray.config import TrainConfig, TrainSettings
from segray.data.manifest import describe_groups, load_splits
from segray.data.sample_list import Splits
from segray.errors import ConfigError, TrainingError
from segray.models.build import check_model, check_size
from segray.models.bundle import has_bundle, load_manifest
from segray.models.gradient_checkpointing import recompute_encoder
from segray.models.layer_decay import compute_layer_factors
from segray.models.sync_batchnorm import synchronise_norms
from segray.runtime.autoscaling import reported_shortage
from segray.runtime.connect import connect_ray
from segray.storage import join_uri, normalize_uri
from segray.training.binding import Binding
from segray.training.checkpoint import RUN_NAME, find_newest_history, find_newest_step, list_checkpoints, remove_surplus
from segray.training.folds.estimate import Estimate
from segray.training.job import TrainJob, get_classes, is_finished
from segray.training.labels.command import check_splits
from segray.training.labels.record import LabelRecord, find_record, remove_record
from segray.training.labels.report import print_warnings
from segray.training.labels.split_report import SplitReport, require_learnable
from segray.training.placement import place_on_cluster
from segray.training.pretrained import find_preprocessing, save_pretrained
from segray.training.sampling import compute_image_weights, needs_presence
from segray.training.time_budget import apply_measured, apply_recorded

_BINDING_NAME = "train.json"
_NUM_MEASURED_EPOCHS = 10_000


@dataclass(frozen=True)
class Validated:
    """A finished cross-validation.

    Attributes:
        estimate: The scores, pooled over the folds and of each.
        report: Label report on all images.
    """

    estimate: Estimate
    report: SplitReport


def run_training(config: TrainConfig, console: Console) -> str:
    """Train a model and return the URI of its bundle; an interrupted run is resumed, a complete one is not repeated.

    A complete run is continued if ``train.num_epochs`` is higher than before; its bundle is replaced at the end. A run
    that was started with ``train.num_epochs`` is not resumed with ``train.time_budget_min``.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The labelled images cannot be used.
        RunMismatchError: The output belongs to a run with other settings or images.
        ClusterError: The cluster can never run the workers.
        TrainingError: The loss is not finite, a worker stalled, workers failed more often than allowed, or no intact
            checkpoint is left.
        StorageError: Permissions, network or disk error.
    """
    config = resolve_output(config)
    check_network(config)
    splits = load_splits(config.data)
    return train_to_bundle(config, splits, splits.compute_sha256(), console)


def resolve_output(config: TrainConfig) -> TrainConfig:
    """Return the configuration with an absolute output, because Ray's workers have another current folder."""
    return config.model_copy(update={"output": normalize_uri(config.output)})


def train_to_bundle(
    config: TrainConfig, splits: Splits, listing: str, console: Console, validated: Validated | None = None
) -> str:
    """Train on given splits and return the URI of the bundle; resumes, and does not repeat a complete run.

    Args:
        config: The resolved configuration, with an absolute output.
        splits: Labelled images; none for validation after a cross-validation.
        listing: sha256 of the images that the run trains on and is scored with.
        console: Where progress and warnings are printed.
        validated: Result of the cross-validation over the same images, or None to check the labels here.

    Raises:
        SegrayError: As ``run_training``.
    """
    output = config.output
    bundle_uri, run_uri = join_uri(output, "bundle"), join_uri(output, RUN_NAME)
    binding = bind_output(config, listing)
    console.print(describe_run(config, splits), highlight=False)
    if config.train.time_budget_min and _is_used(config):
        config = apply_recorded(config, console)
    if is_bundled(config):
        console.print("this run is complete; nothing to do", highlight=False)
        return bundle_uri
    if splits.val:
        require_evaluated(config.train, run_uri)
    num_workers = config.train.num_train_workers
    with connect_ray(num_workers, num_workers if config.train.use_gpu else 0), reported_shortage(console):
        print_wait(config, console)
        report = validated.report if validated else check_run(config, splits, console)
        job = build_job(config, splits, report, run_uri)
        # These imports take 8 s, so they follow the label check.
        from segray.training.bundling import write_bundle
        from segray.training.fit import fit
        from segray.training.tracking import Tracking

        binding.write()
        save_pretrained(config)
        if config.train.time_budget_min:
            with console.status("measuring the time of some steps"):
                measured = fit(build_measuring_job(job), output, Console(quiet=True), lambda _: True)
            config = apply_measured(config, measured, console)
            job = replace(job, config=config)
        with Tracking(config, job.classes, output, console, find_newest_step(run_uri)) as tracking:
            fit(job, output, console, tracking.log, tracking.log_steps)
            tracking.write_csv(find_newest_history(run_uri))  # Including epochs that the display missed.
        with console.status("writing the bundle"):
            write_bundle(job, bundle_uri, console, validated.estimate if validated else None)
        remove_surplus(run_uri, config.train.num_best_checkpoints)
    return bundle_uri


def bind_output(config: TrainConfig, listing: str) -> Binding:
    """Return the binding of a run to its output, which is still to be written if the output is unused.

    ``listing`` is the sha256 of the images that the run trains on and is scored with.

    Raises:
        RunMismatchError: The output belongs to a run with other settings or images.
    """
    output = normalize_uri(config.output)
    binding = Binding(join_uri(output, _BINDING_NAME), config.bound_settings, listing)
    if _is_used(config):
        binding.require_same()
    return binding


def _is_used(config: TrainConfig) -> bool:
    """Return whether the output has a bundle or a checkpoint."""
    output = normalize_uri(config.output)
    return has_bundle(join_uri(output, "bundle")) or bool(list_checkpoints(join_uri(output, RUN_NAME)))


def is_bundled(config: TrainConfig) -> bool:
    """Return whether a run is complete: its bundle holds the best of all epochs.

    Raises:
        TrainingError: ``train.num_epochs`` was raised, and the checkpoints were removed.
        BundleError: The bundle is damaged.
    """
    output = normalize_uri(config.output)
    bundle_uri = join_uri(output, "bundle")
    return has_bundle(bundle_uri) and is_complete(config.train, bundle_uri, join_uri(output, RUN_NAME))


def is_complete(settings: TrainSettings, bundle_uri: str, run_uri: str) -> bool:
    """Return whether a run that has a bundle is complete; it is not if ``train.num_epochs`` was raised since.

    Raises:
        TrainingError: It is not, and its checkpoints were removed.
        BundleError: The bundle is damaged.
    """
    manifest, _ = load_manifest(bundle_uri)
    history = find_newest_history(run_uri)
    if history:  # A bundle of an earlier version does not say how many epochs it was chosen from.
        is_newest = manifest.metrics.get("num_epochs", len(history)) == len(history)
        return is_newest and is_finished(history, settings)
    num_epochs = manifest.config["train"]["num_epochs"]
    if settings.num_epochs > num_epochs:
        raise TrainingError(
            f"train.num_epochs: the run was complete after {num_epochs} epochs, got {settings.num_epochs}, but the "
            f"checkpoints under {run_uri} were removed; restore them, or choose another output"
        )
    return True


def require_evaluated(settings: TrainSettings, run_uri: str) -> None:
    """Check that a run does not end, by a lowered ``train.num_epochs``, at an epoch that was not evaluated.

    Raises:
        ConfigError: It does.
    """
    history, num_epochs = find_newest_history(run_uri), settings.num_epochs
    if len(history) >= num_epochs and all("val_mean_iou" not in metrics for metrics in history[num_epochs - 1 :]):
        raise ConfigError(
            f"train.num_epochs: expected more than the {len(history)} epochs that the run has, because none from epoch "
            f"{num_epochs} on was evaluated, got {num_epochs}; set at least {len(history) + 1}"
        )


def print_wait(config: TrainConfig, console: Console) -> None:
    """Print which resources the workers will wait for, if the connected cluster cannot run them at the moment.

    Raises:
        ClusterError: The cluster can never run the workers, or a task of the label check.
    """
    _, wait = place_on_cluster(config.train)
    if wait:
        console.print(wait, highlight=False)


def check_run(config: TrainConfig, splits: Splits, console: Console) -> SplitReport:
    """Check the labels and print warnings; return the counts of the training labels. Ray must be connected.

    Labels that were found to have no faults are not checked again, unless ``train.recheck_labels`` says so.

    Raises:
        ConfigError: The input that the encoder's weights expect is not supported, or cannot be looked up.
        DataError: The labels cannot be used for training.
        StorageError: Permissions, network or disk error.
    """
    find_preprocessing(config)
    for line in describe_groups(config.data, splits):
        console.print(line, highlight=False)
    listing = splits.compute_sha256(with_version=True)
    return check_once(config, listing, lambda: check_splits(config, splits, console), console)["train"]


def check_once(
    config: TrainConfig, listing: str, check: Callable[[], Mapping[str, SplitReport]], console: Console
) -> dict[str, SplitReport]:
    """Check labels and print warnings, unless they were found to have no faults before; return the counts by split.

    Args:
        config: The resolved configuration; its output has the record of an earlier check.
        listing: sha256 of what is checked, and of its version if that is known.
        check: Checks the labels.
        console: Where the findings are printed.

    Raises:
        DataError: The labels cannot be used for training.
        StorageError: Permissions, network or disk error.
    """
    classes, output = get_classes(config), normalize_uri(config.output)
    record = None if config.train.recheck_labels else find_record(output, listing, classes, needs_presence(config))
    if record:
        console.print(str(record), highlight=False)
    else:
        remove_record(output)  # Or it would be found again after a check that finds faults.
        reports = check()
        for name, report in reports.items():
            require_learnable(report, name)
        print_warnings(reports, console)
        record = LabelRecord.of(reports, listing, classes)
        record.write(output)
    return {name: counts.build_report() for name, counts in record.splits.items()}


def build_job(config: TrainConfig, splits: Splits, report: SplitReport, run_uri: str) -> TrainJob:
    """Return the job description for the workers of a run; ``report`` is the one on the training labels.

    Raises:
        ConfigError: The input that the encoder's weights expect is not supported, or cannot be looked up.
    """
    weights = None
    if config.train.sampling == "class_balanced":
        weights = compute_image_weights(report.presence, report.image_count)
    return TrainJob(
        config,
        get_classes(config),
        splits,
        find_preprocessing(config),
        _get_class_weights(config, report),
        run_uri,
        weights,
    )


def build_measuring_job(job: TrainJob) -> TrainJob:
    """Return the job that measures how long steps take; its schedule is longer than any measurement."""
    train = job.config.train.model_copy(update={"num_epochs": _NUM_MEASURED_EPOCHS})
    return replace(job, config=job.config.model_copy(update={"train": train}), only_measures=True)


def check_network(config: TrainConfig) -> None:
    """Check that the network can be built and supports the training settings, before anything is read or started.

    Raises:
        ConfigError: The network cannot be built, or does not support a setting; the message names the setting.
    """
    num_classes = len(config.data.class_names)
    outline = check_model(config.model, num_classes, config.image_size)
    if config.augmentation.crop_size:
        check_size(outline, num_classes, config.augmentation.crop_size, "augmentation.crop_size")
    if config.train.sync_batchnorm:
        synchronise_norms(outline, torch.device("cpu"))
    if config.train.layer_decay is not None:
        compute_layer_factors(outline, config.train.layer_decay)
    if config.train.gradient_checkpointing:
        recompute_encoder(outline)


def _get_class_weights(config: TrainConfig, report: SplitReport) -> npt.NDArray[np.float64] | None:
    """Return the class weights of the loss, (C,) float64, or None for equal weights."""
    given = config.loss.class_weights
    if given != "auto":
        return None if given is None else np.array(given, np.float64)
    from segray.models.losses import compute_median_frequency_weights

    return compute_median_frequency_weights(report.pixel_count, report.image_px)


def describe_run(config: TrainConfig, splits: Splits) -> str:
    """Return the first line of output: device, precision, workers, images per split, and classes."""
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
