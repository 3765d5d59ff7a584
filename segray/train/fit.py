"""Ray Train's part: fit on the workers, then make the bundle of the best epoch."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import TrainingFailedError
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from rich.console import Console

from segray.bundle import save_bundle
from segray.classes import ClassMap
from segray.cluster import find_segray_error, get_last_line
from segray.config import TrainConfig
from segray.errors import TrainingError
from segray.images import resize_image
from segray.manifest import Sample, Splits
from segray.models.build import build_model
from segray.models.prediction import compute_mask
from segray.pictures import Panel, draw_comparison, draw_curves
from segray.storage import get_file_name, join_uri, remove_file
from segray.storage.arrow import open_filesystem
from segray.train.checkpoint import RUN_NAME, TrainingState, find_best_state, find_newest_history
from segray.train.feed import compute_num_steps, load_labelled_image
from segray.train.job import TrainJob, train_loop_per_worker
from segray.train.progress import show_training
from segray.transforms import Preprocessing

_NUM_PICTURES = 4
_NUM_CHECKPOINTS = 2  # the best two, and Ray Train keeps the newest besides


def fit(
    config: TrainConfig,
    classes: ClassMap,
    splits: Splits,
    preprocessing: Preprocessing,
    output: str,
    console: Console,
) -> None:
    """Train on a connected Ray, from the newest whole checkpoint under ``output`` to the last epoch.

    Raises:
        TrainingError: The loss is not finite, or workers were lost more often than allowed.
        SegrayError: What a worker raised.
    """
    run_uri = join_uri(output, RUN_NAME)
    settings = config.train
    filesystem, storage_path = open_filesystem(output)
    # Ray Train's list of its checkpoints stops a run if its driver died while writing it, if it names a folder that is
    # gone, or if another Ray wrote it. Workers find checkpoints by looking, so Ray starts a new list each time.
    remove_file(join_uri(run_uri, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))
    num_steps = compute_num_steps(len(splits.train), settings.global_batch_size) * settings.num_epochs
    with show_training(console, num_steps) as board:
        trainer = ray.train.torch.TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"job": TrainJob(config, classes, splits, preprocessing, run_uri, board)},
            scaling_config=ray.train.ScalingConfig(num_workers=settings.num_train_workers, use_gpu=settings.use_gpu),
            run_config=ray.train.RunConfig(
                name=RUN_NAME,
                storage_path=storage_path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=_NUM_CHECKPOINTS, checkpoint_score_attribute="val_mean_iou"
                ),
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise find_segray_error(error) or TrainingError(
                f"training failed on its workers more than {settings.max_failures} times (train.max_failures); "
                f"the same command goes on from the last epoch. Last failure: {get_last_line(error)}"
            ) from error
    if result.return_value and result.return_value["error"]:
        raise TrainingError(result.return_value["error"])


def write_bundle(
    config: TrainConfig,
    classes: ClassMap,
    splits: Splits,
    preprocessing: Preprocessing,
    output: str,
    bundle_uri: str,
    console: Console,
) -> None:
    """Write the bundle of the epoch with the highest validation mean IoU.

    Raises:
        SegrayError: No checkpoint is whole, or the store failed.
    """
    run_uri = join_uri(output, RUN_NAME)
    best = find_best_state(run_uri, console.print)
    history = find_newest_history(run_uri)
    save_bundle(
        bundle_uri,
        weights=best.model,
        model=config.model,
        classes=classes,
        image_size=config.image_size,
        preprocessing=preprocessing,
        metrics=best.history[-1],
        config=config.model_dump(mode="json"),
        files={
            "metrics.csv": format_metrics_csv(history, classes),
            "curves.png": draw_curves(history, classes),
            "predictions.png": _draw_predictions(config, classes, _spread(splits.val), best, preprocessing),
        },
    )


def _spread(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return a few samples from all over a split."""
    return samples[:: -(-len(samples) // _NUM_PICTURES)]


def _draw_predictions(
    config: TrainConfig,
    classes: ClassMap,
    samples: Sequence[Sample],
    state: TrainingState,
    preprocessing: Preprocessing,
) -> bytes:
    model = build_model(config.model.model_copy(update={"encoder_weights": None}), classes.num_classes).eval()
    model.load_state_dict(state.model)
    panels = []
    for sample in samples:
        image, truth = load_labelled_image(sample, classes)
        with torch.inference_mode():
            logits = model(
                preprocessing.apply(torch.from_numpy(np.array(resize_image(image, config.image_size)))[None])
            )
        mask = compute_mask(logits[0], (truth.shape[0], truth.shape[1])).numpy()
        panels.append(Panel(get_file_name(sample.image_uri), image, truth, mask))
    return draw_comparison(panels, classes)


def format_metrics_csv(history: Sequence[dict[str, Any]], classes: ClassMap) -> bytes:
    """Return the metrics of each epoch as CSV; an undefined score is an empty cell."""
    plain = ["epoch", "loss", "learning_rate", "images_per_s", "val_mean_iou", "val_mean_dice"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(plain + [f"val_{score}_{name}" for score in ("iou", "dice") for name in classes.names])
    for metrics in history:
        writer.writerow([metrics[name] for name in plain] + metrics["val_iou"] + metrics["val_dice"])
    return buffer.getvalue().encode()
