"""The number of epochs that fits a time budget, computed once per run."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from segray.config import TrainConfig, load_config
from segray.errors import ConfigError
from segray.training.time_budget import apply_measured, apply_recorded, compute_num_epochs

SPEED = {"s_per_epoch": 10.0, "s_per_evaluation": 4.0}


def spend(num_epochs: int, s_per_epoch: float, s_per_evaluation: float, every: int) -> float:
    """Return the seconds of a run, epoch by epoch."""
    total_s = 0.0
    for epoch in range(1, num_epochs + 1):
        total_s += s_per_epoch
        if epoch % every == 0 or epoch == num_epochs:
            total_s += s_per_evaluation
    return total_s


@pytest.mark.parametrize("every", [1, 2, 5, 100])
@pytest.mark.parametrize("s_per_evaluation", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("budget_s", [7.0, 60.0, 601.0, 3600.0])
def test_one_more_epoch_would_not_fit(budget_s: float, s_per_evaluation: float, every: int) -> None:
    num_epochs = compute_num_epochs(budget_s, 9.0, s_per_evaluation, every)
    assert num_epochs == 1 or spend(num_epochs, 9.0, s_per_evaluation, every) <= budget_s
    assert spend(num_epochs + 1, 9.0, s_per_evaluation, every) > budget_s


@pytest.fixture
def make_budget(make_train_config: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., TrainConfig]:
    values = make_train_config(tmp_path).model_dump(mode="json")

    def make(**train: object) -> TrainConfig:
        return TrainConfig.model_validate({**values, "train": {"global_batch_size": 4, **train}})

    return make


def test_a_resumed_run_keeps_its_number_of_epochs(make_budget: Callable[..., TrainConfig]) -> None:
    text = io.StringIO()
    console = Console(file=text, width=300)
    config = make_budget(time_budget_min=2)
    started = apply_measured(config, SPEED, console)
    assert (started.train.num_epochs, started.train.time_budget_min) == (8, None)
    resumed = apply_recorded(make_budget(time_budget_min=2, eval_every_epochs=4), console)
    assert resumed.train.num_epochs == 8
    longer = apply_recorded(make_budget(time_budget_min=4), console)
    assert longer.train.num_epochs == 17
    assert apply_recorded(make_budget(time_budget_min=4), console).train.num_epochs == 17
    lines = text.getvalue().splitlines()
    assert lines[0] == lines[1]
    assert lines[0].startswith("train.time_budget_min 2: train.num_epochs is 8, at 10 s per epoch and 4 s per eval")
    assert len(lines) == 4


@pytest.mark.parametrize("content", [None, "{"])
def test_a_run_whose_number_of_epochs_was_not_recorded_does_not_take_a_budget(
    make_budget: Callable[..., TrainConfig], console: Console, tmp_path: Path, content: str | None
) -> None:
    if content:
        (tmp_path / "time_budget.json").write_text(content)
    message = r"^train\.time_budget_min: the run in .* started with train\.num_epochs, .* got 2; set train\.num_epochs"
    with pytest.raises(ConfigError, match=message):
        apply_recorded(make_budget(time_budget_min=2), console)


def test_a_budget_and_a_number_of_epochs_exclude_each_other(make_budget: Callable[..., TrainConfig]) -> None:
    values = make_budget(time_budget_min=2).model_dump(mode="json", exclude={"train"})
    message = r"time_budget_min: expected either time_budget_min \(2\) or num_epochs \(3\), got both; remove one"
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, {**values, "train": {"time_budget_min": 2, "num_epochs": 3}})
