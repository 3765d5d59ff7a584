"""A checkpoint restored into new objects continues identically for every optimizer, schedule and scaler."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from segray.config import ModelConfig, TrainSettings
from segray.models.build import SegmentationModel, build_model
from segray.training.checkpoint import TrainingState, load_state, save_state
from segray.training.worker.optimisation import WeightAverage, build_optimizer, build_schedule
from segray.training.worker.state import restore_state
from segray.training.worker.steps import Learner, train_step
from tests.training.worker.learner import make_batch, make_learner

NUM_STEPS = 8


class Run:
    """The objects that one rank trains with."""

    def __init__(self, settings: TrainSettings) -> None:
        torch.manual_seed(0)
        self.model: SegmentationModel = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), 3).train()
        optimizer = build_optimizer(self.model, settings)
        self.learner: Learner = make_learner(self.model, optimizer, precision=settings.precision)
        self.schedule = build_schedule(optimizer, settings, NUM_STEPS)
        self.average = WeightAverage(self.model, 0.9)

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(train_step(self.learner, [make_batch([step], side=32)], lambda stage: None))
            self.schedule.step()
            self.average.update()
        return losses

    def gather(self, num_steps_done: int) -> TrainingState:
        with self.average.applied():
            average = {name: value.clone() for name, value in self.model.state_dict().items()}
        return TrainingState(
            num_steps_done=num_steps_done,
            model=self.model.state_dict(),
            optimizer=get_optimizer_state_dict(self.model, self.learner.optimizer),
            schedule=self.schedule.state_dict(),
            scaler=self.learner.scaler.state_dict(),
            average=average,
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "schedule": "poly", "warm_up_fraction": 0.5},
        {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant"},
        {"schedule": "cosine", "encoder_lr_factor": 0.1},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_a_restored_run_continues_identically(settings: dict[str, Any], tmp_path: Path) -> None:
    chosen = TrainSettings(learning_rate=0.01, **settings)
    uninterrupted, interrupted, restored = Run(chosen), Run(chosen), Run(chosen)
    losses = uninterrupted.train(range(NUM_STEPS))
    interrupted.train(range(3))
    save_state(str(tmp_path), interrupted.gather(3))
    restore_state(load_state(str(tmp_path)), restored.model, restored.learner, restored.schedule, restored.average)
    assert restored.train(range(3, NUM_STEPS)) == losses[3:]
    for name, expected in uninterrupted.gather(NUM_STEPS).weights.items():
        assert torch.equal(restored.gather(NUM_STEPS).weights[name], expected), name
    assert restored.learner.scaler.state_dict() == uninterrupted.learner.scaler.state_dict()
    assert restored.schedule.get_last_lr() == uninterrupted.schedule.get_last_lr()
