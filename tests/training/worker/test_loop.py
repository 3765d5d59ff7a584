"""When the results of queued steps are read, who writes a checkpoint, and the measured speed. Without Ray."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import ray.train
import torch
from ray.train import Checkpoint
from torch import nn

from segray.config import TrainSettings
from segray.data.sample_list import Sample, Splits
from segray.training.checkpoint import TrainingState
from segray.training.checkpoint_parts import Rows
from segray.training.job import TrainJob
from segray.training.worker import loop, measure
from segray.training.worker.non_finite import NonFiniteLossError
from segray.training.worker.state import Trainer

SAMPLES = [Sample(f"{number}.png", f"{number}-mask.png") for number in range(40)]


def build_trainer(device: str = "cpu", **settings: Any) -> Any:
    """Build a trainer of 20 images in an epoch, without a model and an optimizer."""
    nothing = cast(Any, None)
    config = cast(Any, SimpleNamespace(train=TrainSettings.model_validate({"global_batch_size": 2, **settings})))
    job = TrainJob(config, nothing, Splits(SAMPLES[:20], SAMPLES), nothing, None, "s3://bucket/run")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Trainer(
        job=job,
        world_rank=0,
        world_size=2,
        model=nothing,
        learner=cast(Any, SimpleNamespace(replica=nn.Identity(), device=torch.device(device), scaler=scaler)),
        schedule=nothing,
        average=None,
        learning_rate=0.0,
        store=nothing,
        augmentation=nothing,
        heartbeat=nothing,
        poster=None,
        num_steps_done=0,
        epoch_losses=[],
        history=[],
        num_skipped=0,
        phases=[],
    )


def test_a_queued_step_that_is_not_finite_is_named_and_later_ones_are_dropped() -> None:
    trainer = build_trainer()
    trainer.num_steps_done = 13
    trainer.unread = [torch.tensor([loss, 1.0], dtype=torch.float64) for loss in (0.5, float("nan"), 0.25)]
    with pytest.raises(NonFiniteLossError, match=r"^loss is nan at step 12 "):
        loop.read_results(trainer)
    assert trainer.epoch_losses == [0.5]
    assert not trainer.unread


def test_the_host_waits_for_a_gpu_every_twenty_steps_and_before_each_checkpoint() -> None:
    def list_reads(trainer: Any) -> list[int]:
        steps = []
        for trainer.num_steps_done in range(1, 46):
            if loop._is_read_due(trainer):
                steps.append(trainer.num_steps_done)
        return steps

    within_epochs = {"global_batch_size": 1, "checkpoint_every_steps": 7}  # An epoch is 20 steps.
    assert list_reads(build_trainer("cuda", **within_epochs)) == [7, 14, 20, 21, 28, 35, 40, 42]
    assert list_reads(build_trainer("cuda")) == [10, 20, 30, 40]
    assert list_reads(build_trainer("cpu")) == list(range(1, 46))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_of_a_sharded_model_writes_its_rows_and_rank_0_removes_old_checkpoints(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.train, "get_context", MagicMock())
    monkeypatch.setattr(loop, "Checkpoint", MagicMock())
    saved, removed = MagicMock(), MagicMock()
    monkeypatch.setattr(loop, "save_sharded_state", saved)
    monkeypatch.setattr(loop, "remove_surplus", removed)
    state = TrainingState(8, {}, {}, {}, rows={"weight": Rows(0, 2)})
    job = build_trainer(num_best_checkpoints=3).job
    loop._upload(job, state, (rank, 2), lambda: None, Checkpoint("/folder"), "checkpoint_8")
    saved.assert_called_once_with("s3://bucket/run/checkpoint_8", state, rank, 2)
    assert [call.args for call in removed.call_args_list] == ([("s3://bucket/run", 3)] if rank == 0 else [])


@pytest.mark.parametrize(("budget_min", "num_expected"), [(10, 4), (100, 53)])
def test_the_speed_is_measured_without_the_warm_up(
    budget_min: float, num_expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of 10 s, others of 2 s, for at most 5% of the budget; 12 images are evaluated in 6 s."""
    now_s, num_steps = [0.0], [0]
    num_evaluated: list[int] = []

    def train_steps(trainer: Trainer, batches: Any, end: int) -> Iterator[None]:
        for step in range(end):
            now_s[0] += 10 if step < 3 else 2
            num_steps[0] += 1
            yield

    def evaluate_split(trainer: Trainer) -> None:
        num_evaluated.append(len(trainer.job.splits.val))
        now_s[0] += 6

    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    for name, replacement in {
        "train_steps": train_steps,
        "evaluate_split": evaluate_split,
        "read_results": lambda trainer: None,
        "iterate_batches": MagicMock(),
    }.items():
        monkeypatch.setattr(measure, name, replacement)
    trainer = build_trainer(time_budget_min=budget_min, eval_batch_size=3)
    measured = measure.measure_speed(trainer)
    assert measured == pytest.approx({"s_per_epoch": 10 * 2, "s_per_evaluation": 40 * 6 / 12})
    assert num_steps[0] == num_expected
    assert num_evaluated == [12]
