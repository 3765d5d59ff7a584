"""The Python API: what the commands do, as functions that return objects. The package ``segray`` exports all of it.

Every function accepts paths and URIs as ``str`` or ``os.PathLike``, and raises a subclass of
``segray.errors.SegrayError`` where the command would print one line and exit. Nothing is printed unless a
``rich.console.Console`` is passed.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from segray.config import ExportFormat, SegmentFile, SegmentSettings, TrainConfig, load_config
from segray.errors import ConfigError
from segray.progress import build_quiet_console

if TYPE_CHECKING:  # The functions import what they need, so that `import segray` stays fast.
    from rich.console import Console

    from segray.models.export import ExportedFile
    from segray.results.reader import RunResults
    from segray.results.status import RunStatus
    from segray.segmentation.interactive import BundleModel
    from segray.segmentation.job import SegmentResult
    from segray.training.labels.report import LabelReport
    from segray.training.tuning.search import TuneResult

Uri: TypeAlias = str | os.PathLike[str]
ConfigSource: TypeAlias = Uri | Mapping[str, Any] | TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    Attributes:
        bundle: URI of the model bundle, to pass to ``segment``, ``export`` and ``load_bundle``.
        metrics: Scores of the epoch that the bundle holds: ``epoch``, ``loss``, ``val_mean_iou``, ``val_dataset_iou``
            (one per class; None where undefined), and the others of ``bundle.json``. With ``train.folds`` the scores
            are those of the cross-validation.
    """

    bundle: str
    metrics: Mapping[str, Any]


def train(config: ConfigSource, *, console: "Console | None" = None) -> TrainResult:
    """Train a model on labelled images and write a bundle; resumes an interrupted run with the same output.

    With ``train.folds``, a cross-validation comes first.

    Args:
        config: A YAML file, a dict of the same structure, or a ``TrainConfig``.
        console: Where progress and warnings are printed; None prints nothing.

    Raises:
        ConfigError: A setting is unknown, missing or wrong.
        DataError: The labels cannot be used for training; ``check`` lists all problems.
        RunMismatchError: The output belongs to a run with other settings or images.
        ClusterError: Ray cannot be reached, or the cluster can never run the workers.
        TrainingError: The loss became non-finite, a worker stalled, or workers were lost too often.
        StorageError: Environment error (permissions, network, disk); fix it and call again to resume.
    """
    from segray.models.bundle import load_manifest
    from segray.training.folds.run import run_folds_and_training

    bundle = run_folds_and_training(_load_train_config(config), console or build_quiet_console())
    return TrainResult(bundle, load_manifest(bundle)[0].metrics)


def segment(
    *,
    bundle: Uri,
    images: Uri | Sequence[Uri],
    output: Uri,
    masks: Uri | Sequence[Uri] | None = None,
    exclude: Uri | Sequence[Uri] | None = None,
    limit: int | None = None,
    settings: Mapping[str, Any] | SegmentSettings | None = None,
    console: "Console | None" = None,
) -> "SegmentResult":
    """Segment every image and write Parquet; resumes an interrupted run, and returns at once for a finished one.

    Images that cannot be read become error rows; they are counted in the result and raise nothing.

    Args:
        bundle: A bundle written by ``train``.
        images: One or several folders, prefixes, globs, images, ``.txt`` lists, ``.csv`` or ``.parquet`` manifests.
        output: The run folder.
        masks: Ground truth to score against, paired by path without extension: one for each of ``images``.
        exclude: Outputs of earlier runs. Images that they have segmented, with the same URI and entity tag, are left
            out.
        limit: Segment only the first ``limit`` images, rounded up to whole fragments, as a trial; a later call without
            it processes the others. None segments all.
        settings: The section ``segment`` of a configuration, as a dict or ``SegmentSettings``.
        console: Where progress and warnings are printed; None prints nothing.

    Raises:
        ConfigError: A setting is unknown or wrong.
        DataError: A list or manifest cannot be used, or there are no images.
        BundleError: The bundle is missing, damaged or incompatible.
        RunMismatchError: The output belongs to a run of another bundle, listing or settings.
        ClusterError: Ray cannot be reached, or a worker failed.
        StoppedByErrorRows: More than ``stop_error_fraction`` of the first rows are error rows.
        StorageError: Environment error (permissions, network, disk); fix it and call again to resume.
    """
    from segray.segmentation.driver import run_segmentation
    from segray.segmentation.job import SegmentJob

    resolved = _load_segment_settings(settings)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1 image, got {limit}")
    job = SegmentJob(
        os.fspath(bundle), _to_uris(images), os.fspath(output), _to_uris(masks), resolved, _to_uris(exclude), limit
    )
    return run_segmentation(job, console or build_quiet_console())


def check(config: ConfigSource, *, console: "Console | None" = None) -> "LabelReport":
    """Open every labelled image and mask, and report every problem.

    Args:
        config: As for ``train``.
        console: Where progress is printed; None prints nothing.

    Returns:
        The report: ``report.ok``, and ``report.faults`` and ``report.warnings`` with the URI, the problem and the
        remedy of each file.

    Raises:
        ConfigError: A setting is unknown, missing or wrong.
        DataError: Images and masks cannot be listed or paired.
        StorageError: Environment error: permissions, network or disk.
    """
    from segray.training.labels.command import check_config

    return check_config(_load_train_config(config), console or build_quiet_console())


def tune(config: ConfigSource, *, console: "Console | None" = None) -> "TuneResult":
    """Search the settings named in the section ``tune``; resumes an interrupted search with the same output.

    Args:
        config: As for ``train``, with a section ``tune``.
        console: Where progress is printed; None prints nothing.

    Returns:
        The best configuration, to pass to ``train``, and all trials, best first.

    Raises:
        SegrayError: As ``train``; ``TrainingError`` if every trial failed.
    """
    from segray.training.tuning.search import run_search

    return run_search(_load_train_config(config), console or build_quiet_console())


def status(output: Uri) -> "RunStatus":
    """Return the progress of a segmentation run, read from its folder; Ray is not used.

    Raises:
        MissingFileError: There is no run at ``output``.
        StorageError: Environment error: permissions, network or disk.
    """
    from segray.results.status import read_status

    return read_status(os.fspath(output))


def export(bundle: Uri, format: "ExportFormat | str", *, output: Uri | None = None) -> "ExportedFile":
    """Write a bundle's model, including its normalisation, as one file that runs without segray.

    Args:
        bundle: A bundle written by ``train``.
        format: ``"onnx"`` (ONNX Runtime and others) or ``"torch_export"`` (torch alone).
        output: The file; None writes ``model.onnx`` or ``model.pt2`` into the bundle.

    Raises:
        ConfigError: The format is unknown, or a package that it needs is missing.
        BundleError: There is no bundle, it cannot be exported, or the exported program does not match the original
            model; nothing is written.
        StorageError: Environment error: permissions, network or disk.
    """
    from segray.models.export import export_bundle

    return export_bundle(os.fspath(bundle), ExportFormat.parse(format), None if output is None else os.fspath(output))


def load_bundle(uri: Uri, *, settings: Mapping[str, Any] | SegmentSettings | None = None) -> "BundleModel":
    """Load a bundle to try it on single images; to process many images, use ``segment``.

    Args:
        uri: A bundle written by ``train``.
        settings: As for ``segment``; ``precision``, ``batch_size``, ``compile`` and ``num_gpus_per_predictor`` (0: CPU)
            are used.

    Returns:
        A model whose ``predict(image)`` returns the mask that ``segment`` writes for that image, bit for bit, with the
        same settings on the same device.

    Raises:
        ConfigError: A setting is unknown or wrong.
        BundleError: The bundle is missing, damaged or incompatible.
        StorageError: Environment error: permissions, network or disk.
    """
    from segray.segmentation.interactive import BundleModel

    return BundleModel(os.fspath(uri), _load_segment_settings(settings))


def open_results(output: Uri) -> "RunResults":
    """Open a run folder for reading; no model, Ray or torch is needed.

    Raises:
        MissingFileError: There is no run at ``output``.
        StorageError: Environment error: permissions, network or disk.
    """
    from segray.results.reader import RunResults

    return RunResults(os.fspath(output))


def _load_train_config(config: ConfigSource) -> TrainConfig:
    return config if isinstance(config, TrainConfig) else load_config(TrainConfig, config)


def _load_segment_settings(settings: Mapping[str, Any] | SegmentSettings | None) -> SegmentSettings:
    if isinstance(settings, SegmentSettings):
        return settings
    return load_config(SegmentFile, {"segment": dict(settings or {})}).segment


def _to_uris(uris: Uri | Sequence[Uri] | None) -> tuple[str, ...]:
    if uris is None:
        return ()
    return tuple(os.fspath(uri) for uri in ([uris] if isinstance(uris, str | os.PathLike) else uris))
