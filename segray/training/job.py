"""The job description that the driver passes to the training workers.

Ray Train's controller imports this module too, so it must not import any model code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segray.config import TrainConfig, TrainSettings
from segray.data.classes import ClassMap
from segray.data.preprocessing import Preprocessing
from segray.data.sample_list import Splits
from segray.training.sampling import ImageWeights


@dataclass(frozen=True)
class TrainJob:
    """Everything that a training worker needs to run.

    Attributes:
        config: The resolved configuration.
        classes: Class names and the mask values that stand for them.
        splits: Labelled images for training and validation.
        preprocessing: Normalisation that the encoder expects; looked up once, by the driver.
        class_weights: (C,) float64 class weights of the loss, or None for equal weights.
        run_uri: Folder of the checkpoints.
        image_weights: How often each training image is drawn, or None for equally often.
        board: Handle of the ``ProgressBoard`` actor.
        pauses_after_epoch: Whether training pauses after each epoch until the driver allows it to continue.
        only_measures: Whether the workers only measure how long steps and evaluation take.
    """

    config: TrainConfig
    classes: ClassMap
    splits: Splits
    preprocessing: Preprocessing
    class_weights: npt.NDArray[np.float64] | None
    run_uri: str
    image_weights: ImageWeights | None = None
    board: Any = None
    pauses_after_epoch: bool = False
    only_measures: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """The number of training steps in an epoch."""
        return compute_num_steps(len(self.splits.train), self.config.train.global_batch_size)

    @property
    def num_steps(self) -> int:
        """The number of training steps of the whole run."""
        return self.steps_per_epoch * self.config.train.num_epochs


def compute_num_steps(num_samples: int, global_batch_size: int) -> int:
    """Return the number of steps in an epoch: the smallest number that takes at least ``num_samples`` samples."""
    return -(-num_samples // global_batch_size)


def get_classes(config: TrainConfig) -> ClassMap:
    """Return the classes that a configuration declares, in the order of the model's output channels."""
    return ClassMap(config.data.class_names, config.data.class_values, config.data.ignore_values)


def is_finished(history: Sequence[Mapping[str, Any]], settings: TrainSettings) -> bool:
    """Return whether training is complete: all epochs are done, or early stopping applies.

    A run stops early only after an evaluated epoch, because an epoch that was not evaluated may be the best.

    Args:
        history: Metrics of each finished epoch.
        settings: ``num_epochs``, and ``early_stopping_epochs`` without a higher ``val_mean_iou``.
    """
    if len(history) >= settings.num_epochs:
        return True
    if settings.early_stopping_epochs is None:
        return False
    scores = [metrics.get("val_mean_iou") for metrics in history]
    if not scores or scores[-1] is None:
        return False
    best = max(score for score in scores if score is not None)
    return len(history) - 1 - scores.index(best) >= settings.early_stopping_epochs
