"""What the driver hands to Ray Train. Light to import: Ray's controller imports it too, and needs no models."""

from dataclasses import dataclass
from typing import Any

from segray.classes import ClassMap
from segray.config import TrainConfig
from segray.manifest import Splits
from segray.transforms import Preprocessing


@dataclass(frozen=True)
class TrainJob:
    """What every worker gets.

    Attributes:
        preprocessing: What the encoder expects; asked for once, by the driver.
        run_uri: Where Ray Train keeps the checkpoints.
        progress_board: Actor that rank 0 posts to.
    """

    config: TrainConfig
    classes: ClassMap
    splits: Splits
    preprocessing: Preprocessing
    run_uri: str
    progress_board: Any


def train_loop_per_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Run the training loop on the job in ``loop_config["job"]``; returns what the loop returns."""
    from segray.train.loop import run_loop

    job: TrainJob = loop_config["job"]
    return run_loop(job)
