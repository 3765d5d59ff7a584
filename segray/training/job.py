"""What the driver hands to Ray Train. Light to import: Ray's controller imports it too, and needs no models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segray.config import TrainConfig, TrainSettings
from segray.data.classes import ClassMap
from segray.data.manifest import Splits
from segray.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class TrainJob:
    """What every worker gets.

    Attributes:
        preprocessing: What the encoder expects; asked for once, by the driver.
        class_weights: (C,) weights of the classes in the loss, or None.
        run_uri: Where the checkpoints are.
        board: Actor that the ranks post to.
        waits_for_leave: Whether the run waits after each epoch until the driver says whether it goes on.
    """

    config: TrainConfig
    classes: ClassMap
    splits: Splits
    preprocessing: Preprocessing
    class_weights: npt.NDArray[np.float64] | None
    run_uri: str
    board: Any = None
    waits_for_leave: bool = False


def get_classes(config: TrainConfig) -> ClassMap:
    """Return the classes that a configuration declares."""
    return ClassMap(config.data.class_names, config.data.class_values, config.data.ignore_values)


def is_finished(history: Sequence[Mapping[str, Any]], settings: TrainSettings) -> bool:
    """Say whether the last epoch is done, or the score has not risen for so long that the run stops early.

    A run stops early only after an epoch that was evaluated: what is not looked at may be better.
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
