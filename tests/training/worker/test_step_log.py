"""Which steps are posted, and with which values."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segray.training.worker.step_log import StepLog


def make_trainer(every: int | None, posted: list[dict[str, Any]] | None) -> Any:
    settings = SimpleNamespace(log_every_steps=every, global_batch_size=4)
    return SimpleNamespace(
        job=SimpleNamespace(config=SimpleNamespace(train=settings)),
        poster=None if posted is None else SimpleNamespace(post_step=posted.append),
        history=[{}, {}],
        learning_rate=0.25,
        num_steps_done=6,
    )


class Result:
    """Loss and gradient norm on a device, for which the host has to wait."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def tolist(self) -> list[float]:
        assert self.loss >= 0, "the loss of a step that is not logged was read"
        return [self.loss, 1.5]


def run(trainer: Any, losses: list[float]) -> None:
    log = StepLog(trainer)
    for loss in losses:
        trainer.num_steps_done += 1
        log.record(Result(loss))  # type: ignore[arg-type]


def test_only_every_nth_step_is_read_and_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    posted: list[dict[str, Any]] = []
    trainer = make_trainer(5, posted)
    run(trainer, [-1, -1, -1, 0.5, -1, -1, -1, -1, 0.75])
    row = {"step": 10, "epoch": 3, "loss": 0.5, "learning_rate": 0.25, "gradient_norm": 1.5, "images_per_s": 8.0}
    assert posted == [row, row | {"step": 15, "loss": 0.75, "images_per_s": 10.0}]


def test_a_skipped_step_has_no_loss() -> None:
    posted: list[dict[str, Any]] = []
    trainer = make_trainer(1, posted)
    log = StepLog(trainer)
    trainer.num_steps_done += 1
    log.record(torch.tensor([0.5, math.inf]))
    assert [(row["loss"], row["gradient_norm"]) for row in posted] == [(None, None)]


@pytest.mark.parametrize(("every", "posted"), [(None, []), (1, None)])
def test_nothing_is_read_on_other_ranks_or_without_logging(every: int | None, posted: list[Any] | None) -> None:
    run(make_trainer(every, posted), [-1, -1])
    assert not posted
