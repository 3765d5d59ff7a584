"""A checkpoint restored into new objects continues identically for every optimizer, schedule and scaler."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from segray.config import ModelConfig, TrainSettings
from segray.models.build import SegmentationModel, build_model
from segray.training.checkpoint import TrainingState, load_state, save_state
from segray.training.worker.optimisation import WeightAverage, build_optimizer
from segray.training.worker.restore import restore_state
from segray.training.worker.state import _build_schedule, _list_phases
from segray.training.worker.steps import Learner, train_step
from tests.training.worker.learner import make_batch, make_learner

NUM_STEPS = 8


class Run:
    """The objects that one rank trains with, new or restored from the checkpoint in a folder; an epoch is 8 steps."""

    def __init__(self, settings: TrainSettings, folder: Path | None = None) -> None:
        torch.manual_seed(0)
        self.model: SegmentationModel = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), 3).train()
        self.model.to(memory_format=torch.channels_last)  # As in training by default.
        optimizer = build_optimizer(self.model, settings)
        self.learner: Learner = make_learner(self.model, optimizer, precision=settings.precision)
        self.average = WeightAverage(self.model, 0.9)
        state = load_state(str(folder)) if folder else None
        if state:
            restore_state(state, self.model, self.learner, self.average)
        config = SimpleNamespace(train=settings, phase_settings={"train": settings.model_dump(mode="json")})
        job: Any = SimpleNamespace(config=config, num_steps=NUM_STEPS * settings.num_epochs)
        self.phases = _list_phases(job, state, 1, None)
        self.schedule = _build_schedule(job, optimizer, state, self.phases)

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(train_step(self.learner, [make_batch([step], side=32)], lambda stage: None)[0].item())
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
            phases=self.phases,
        )


@pytest.mark.parametrize("has_phases", [True, False], ids=["now", "by an earlier version"])
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
def test_a_restored_run_continues_identically(settings: dict[str, Any], has_phases: bool, tmp_path: Path) -> None:
    chosen = TrainSettings(learning_rate=0.01, num_epochs=1, **settings)
    uninterrupted, interrupted = Run(chosen), Run(chosen)
    losses = uninterrupted.train(range(NUM_STEPS))
    interrupted.train(range(3))
    state = interrupted.gather(3)
    save_state(str(tmp_path), state if has_phases else replace(state, phases=[]))
    restored = Run(chosen, tmp_path)
    assert restored.train(range(3, NUM_STEPS)) == losses[3:]
    for name, expected in uninterrupted.gather(NUM_STEPS).weights.items():
        assert torch.equal(restored.gather(NUM_STEPS).weights[name], expected), name
    assert restored.learner.scaler.state_dict() == uninterrupted.learner.scaler.state_dict()
    assert restored.schedule.get_last_lr() == uninterrupted.schedule.get_last_lr()


def test_weight_decay_is_not_that_of_a_checkpoint_whose_parameters_were_divided_in_another_way(tmp_path: Path) -> None:
    run = Run(TrainSettings())
    run.train(range(2))
    state = run.gather(2)
    first, *others = state.optimizer["param_groups"]
    moved = [{**group, "params": [*group["params"], *first["params"][:1]]} for group in others]
    groups = [*moved, {**first, "params": first["params"][1:]}]
    save_state(str(tmp_path), replace(state, optimizer={**state.optimizer, "param_groups": groups}))
    restored = Run(TrainSettings(), tmp_path)
    pairs = zip(restored.learner.optimizer.param_groups, run.learner.optimizer.param_groups, strict=True)
    for group, expected in pairs:
        assert group["weight_decay"] == expected["weight_decay"]
        assert [p.shape for p in group["params"]] == [p.shape for p in expected["params"]]
    assert restored.train(range(2, 4)) == run.train(range(2, 4))


def test_a_run_with_more_epochs_continues_with_the_rates_of_the_longer_schedule(tmp_path: Path) -> None:
    once, twice = (
        TrainSettings(learning_rate=0.01, schedule="cosine", warm_up_fraction=0.25, num_epochs=number)
        for number in (1, 2)
    )
    short, longer = Run(once), Run(twice)
    short.train(range(NUM_STEPS))
    longer.train(range(NUM_STEPS))
    save_state(str(tmp_path), short.gather(NUM_STEPS))
    continued = Run(twice, tmp_path)
    assert [(phase.num_steps_done, phase.epoch) for phase in continued.phases] == [(0, 1), (NUM_STEPS, 1)]
    for step in range(NUM_STEPS, 2 * NUM_STEPS):
        assert continued.schedule.get_last_lr() == longer.schedule.get_last_lr()
        assert continued.learner.optimizer.param_groups[0]["lr"] == continued.schedule.get_last_lr()[0] > 0
        continued.train(range(step, step + 1))
        longer.train(range(step, step + 1))


def test_a_run_whose_epochs_are_lowered_below_those_done_stays_at_the_last_rate(tmp_path: Path) -> None:
    run, ended = Run(TrainSettings(num_epochs=2)), Run(TrainSettings(num_epochs=1))
    run.train(range(NUM_STEPS + 2))
    ended.train(range(NUM_STEPS))
    save_state(str(tmp_path), run.gather(NUM_STEPS + 2))
    assert Run(TrainSettings(num_epochs=1), tmp_path).schedule.get_last_lr() == ended.schedule.get_last_lr()


@pytest.mark.parametrize(("before", "after"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_a_run_continues_in_another_precision(before: str, after: str, tmp_path: Path) -> None:
    run = Run(TrainSettings(precision=before))
    run.train(range(6))
    save_state(str(tmp_path), run.gather(6))
    saved, continued = run.gather(6), Run(TrainSettings(precision=after), tmp_path)
    restored = continued.gather(6)
    for name, value in saved.model.items():
        assert torch.equal(restored.model[name], value), name
    for parameter, values in saved.optimizer["state"].items():
        for name, value in values.items():
            assert torch.equal(restored.optimizer["state"][parameter][name], value), (parameter, name)
    assert all(math.isfinite(loss) for loss in continued.train(range(6, 12)))
    pairs = zip(continued.model.parameters(), run.model.parameters(), strict=True)
    assert any(not torch.equal(new, old) for new, old in pairs)


def test_a_moving_average_that_is_switched_on_later_starts_from_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    run = Run(TrainSettings(learning_rate=0.1))
    run.train(range(3))
    save_state(str(tmp_path), replace(run.gather(3), average=None))
    average = Run(TrainSettings(learning_rate=0.1), tmp_path).gather(3).average
    assert average is not None
    assert all(torch.equal(average[name], value) for name, value in run.model.state_dict().items())
