"""Between two reads of the results, training does not make the host wait for a GPU; watched on the CPU.

``tests/gpu/test_training.py`` does the same with CUDA's own detector.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from segray.config import LOSS_TERMS, ModelConfig, TrainSettings
from segray.models.build import build_model
from segray.training.worker.feed import TrainBatch
from segray.training.worker.loop import read_results, train_steps
from segray.training.worker.optimisation import WeightAverage, build_optimizer, build_schedule
from tests.training.worker.learner import CPU, NUM_CLASSES, make_batch, make_learner

NUM_STEPS = 3
NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NoReading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises an error where an operator reads a value, such as ``item``, also to find the shape of its result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_index = func is torch.ops.aten.index.Tensor  # It reads only masks.
        if NEEDS_VALUES & set(func.tags) and not (
            is_index and all(i is None or i.dtype != torch.bool for i in args[1])
        ):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


class NoCopying(TorchFunctionMode):
    """Raises an error where segray copies between host and GPU so that the host waits, although here both are CPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        is_to_device = func is torch.Tensor.to and any(
            isinstance(value, torch.device) for value in (*args, *options.values())
        )
        if (
            func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist)
            or (is_to_device and not options.get("non_blocking"))
        ) and not sys._getframe(1).f_globals["__name__"].startswith("torch."):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **options)


@contextmanager
def no_waiting() -> Iterator[None]:
    with NoReading(), NoCopying():  # type: ignore[no-untyped-call]
        yield


def build_trainer(loss: dict[str, Any], settings: TrainSettings) -> Any:
    """Build what ``train_steps`` needs of a rank's objects."""
    model = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), NUM_CLASSES).train()
    optimizer = build_optimizer(model, settings)
    return SimpleNamespace(
        job=SimpleNamespace(config=SimpleNamespace(train=settings)),
        learner=make_learner(model, optimizer, loss, settings.max_gradient_norm, settings.precision),
        schedule=build_schedule(optimizer, settings, NUM_STEPS),
        average=WeightAverage(model, 0.9),
        heartbeat=SimpleNamespace(update=lambda step, stage: None),
        world_rank=0,
        num_steps_done=0,
        num_skipped=0,
        epoch_losses=[],
        unread=[],
    )


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (dict.fromkeys(LOSS_TERMS, 1.0), {"precision": "fp32", "max_gradient_norm": 1.0}),
        ({}, {"precision": "bf16", "optimizer": "sgd"}),
        ({}, {"precision": "fp16"}),
    ],
)
def test_only_reading_the_results_waits(loss: dict[str, Any], settings: dict[str, Any]) -> None:
    trainer = build_trainer(loss, TrainSettings.model_validate(settings))
    steps: list[list[TrainBatch]] = [[make_batch([step, part]) for part in range(2)] for step in range(NUM_STEPS)]
    with no_waiting():
        for _ in train_steps(trainer, iter(steps), NUM_STEPS):
            pass
        with pytest.raises(AssertionError, match="makes the host wait"):
            read_results(trainer)
    read_results(trainer)
    assert len(trainer.epoch_losses) == NUM_STEPS


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values[0].item(),
        lambda values: bool(values.isnan().any()),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.tolist(),
        lambda values: values.cpu(),
        lambda values: values.to(CPU),
        lambda values: values.to(device=CPU),
    ],
)
def test_each_way_to_wait_is_found(wait: Callable[[torch.Tensor], Any]) -> None:
    values = torch.ones(3)
    with no_waiting():
        values.to(CPU, non_blocking=True)[torch.tensor([0, 1])].to(torch.float64)
        with pytest.raises(AssertionError, match="makes the host wait"):
            wait(values)
