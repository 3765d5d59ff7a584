"""What the driver hands to Ray Train. Light to import: Ray's controller imports it too, and needs no models."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segray.classes import ClassMap
from segray.config import TrainConfig
from segray.manifest import Splits
from segray.transforms import Preprocessing


@dataclass(frozen=True)
class TrainJob:
    """What every worker gets.

    Attributes:
        preprocessing: What the encoder expects; asked for once, by the driver.
        class_weights: (C,) weights of the classes in the loss, or None.
        run_uri: Where the checkpoints are.
        board: Actor that the ranks post to.
    """

    config: TrainConfig
    classes: ClassMap
    splits: Splits
    preprocessing: Preprocessing
    class_weights: npt.NDArray[np.float64] | None
    run_uri: str
    board: Any = None


def train_loop_per_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Run the training loop on the job in ``loop_config["job"]``; returns what the loop returns."""
    from segray.train.loop import run_loop

    job: TrainJob = loop_config["job"]
    return run_loop(job)
