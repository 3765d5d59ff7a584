"""Write the model bundle of a finished run: the weights of the best epoch, with scores, pictures and a model card."""

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import torch
from rich.console import Console

from segray.data.images import resize_image
from segray.models.build import SegmentationModel, build_model
from segray.models.bundle import BundleDescription, save_bundle
from segray.models.prediction import compute_mask
from segray.plots import Panel, draw_comparison, draw_confusion, draw_curves
from segray.schema import get_library_versions
from segray.storage import get_file_name
from segray.training.checkpoint import find_best_state, find_last_state, find_newest_history, find_newest_phases
from segray.training.folds.estimate import Estimate, describe_spread
from segray.training.job import TrainJob
from segray.training.phases import describe_phases
from segray.training.tracking import format_metrics_csv
from segray.training.worker.sample_store import load_labelled_image

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("segray.training", "."), trim_blocks=True, lstrip_blocks=True, autoescape=False
)


def write_bundle(job: TrainJob, bundle_uri: str, console: Console, estimate: Estimate | None = None) -> None:
    """Write the bundle of the epoch with the highest validation mean IoU, or of the last one after a cross-validation.

    Args:
        job: The description of the finished run.
        bundle_uri: The folder to write.
        console: Where damaged checkpoints are reported.
        estimate: Scores of the cross-validation, which become those of a bundle without a validation split.

    Raises:
        TrainingError: No checkpoint is intact and, if there is a validation split, evaluated.
        DataError: A validation image to draw can no longer be used.
        StorageError: Permissions, network or disk error.
    """
    find_state = find_best_state if estimate is None else find_last_state
    best = find_state(job.run_uri, console.print)
    history, phases = find_newest_history(job.run_uri), find_newest_phases(job.run_uri)
    metrics = {**best.history[-1], **(estimate.pooled if estimate else {})}
    without_weights = job.config.model.model_copy(update={"encoder_weights": None})
    model = build_model(without_weights, job.classes.num_classes, job.config.image_size).eval()
    model.load_state_dict(best.weights)
    save_bundle(
        bundle_uri,
        best.weights,
        BundleDescription(
            model=job.config.model,
            classes=job.classes,
            image_size=job.config.image_size,
            preprocessing=job.preprocessing,
            metrics={**metrics, "num_epochs": len(history)},
            config=job.config.model_dump(mode="json"),
        ),
        files={
            "metrics.csv": format_metrics_csv(history, job.classes),
            "curves.png": draw_curves(history, job.classes),
            "confusion.png": draw_confusion(np.array(metrics["val_confusion"]), job.classes),
            **_draw_extremes(job, model, metrics),
            "model_card.md": _format_card(job, len(history), metrics, describe_phases(phases), estimate),
        },
    )


def _draw_extremes(job: TrainJob, model: SegmentationModel, metrics: dict[str, Any]) -> dict[str, bytes]:
    """Return pictures of the best and the worst validation images by file name; none without a validation split."""
    if not job.splits.val:
        return {}
    return {f"{name}.png": _draw_predictions(job, model, metrics[f"val_{name}_images"]) for name in ("best", "worst")}


def _draw_predictions(job: TrainJob, model: SegmentationModel, scores: Sequence[tuple[float, int]]) -> bytes:
    """Return a PNG of validation images beside their truth and prediction; each score is a (mean IoU, index) pair."""
    config, classes = job.config, job.classes
    panels = []
    for score, number in scores:
        sample = job.splits.val[number]
        image, truth = load_labelled_image(sample, classes)
        resized = torch.from_numpy(np.array(resize_image(image, config.image_size)))[None]
        with torch.inference_mode():
            logits_nchw = model(job.preprocessing.apply(resized))
        mask = compute_mask(logits_nchw[0], (truth.shape[0], truth.shape[1])).numpy()
        panels.append(Panel(f"{get_file_name(sample.image_uri)}  IoU {score:.3f}", image, truth, mask))
    return draw_comparison(panels, classes)


def _format_card(
    job: TrainJob, num_epochs: int, metrics: dict[str, Any], changes: Sequence[str], estimate: Estimate | None
) -> bytes:
    """Return the model card, in Markdown, of the epoch with these metrics; ``changes`` are those of the settings."""
    columns = ("dataset_iou", "dataset_dice", "precision", "recall", "boundary_iou", "mean_image_iou")
    rows = [
        {"name": name, **{column: metrics[f"val_{column}"][index] for column in columns}}
        for index, name in enumerate(job.classes.names)
    ]
    card = _TEMPLATES.get_template("model_card.md.j2").render(
        config=job.config,
        classes=job.classes,
        splits=job.splits,
        metrics=metrics,
        num_epochs=num_epochs,
        changes=changes,
        columns=columns,
        rows=rows,
        estimate=estimate,
        describe_spread=describe_spread,
        class_weights=None if job.class_weights is None else ", ".join(f"{weight:.3g}" for weight in job.class_weights),
        augmentation=", ".join(f"{name} {value}" for name, value in job.config.augmentation.changes.items()),
        versions=get_library_versions(),
    )
    return card.encode()
