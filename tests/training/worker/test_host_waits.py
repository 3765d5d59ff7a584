"""Between two reads of the results, training does not make the host wait for a GPU; fake tensors stand for the GPU."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segray.config import LOSS_TERMS, ModelConfig, TrainSettings
from segray.models.build import build_model
from segray.training.worker.feed import TrainBatch
from segray.training.worker.loop import read_results, train_steps
from segray.training.worker.optimisation import WeightAverage, build_optimizer, build_schedule
from segray.training.worker.steps import train_step
from tests.training.worker.learner import NUM_CLASSES, make_learner

GPU = torch.device("cuda", 0)
NUM_STEPS = 3


class NoWaiting(TorchDispatchMode):
    """Raises an error for a copy between host and GPU that makes the host wait.

    Fake tensors raise one themselves where a value is read, such as by ``item``, or decides about a shape.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            is_blocking = not (options.get("non_blocking") or (len(args) > 2 and args[2]))
            if is_blocking and source.device != result.device:
                raise AssertionError(f"a copy from {source.device} to {result.device} that waits")
        return result


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    """Tensors on a GPU that have shapes but no values."""
    with FakeTensorMode(), NoWaiting():
        yield


def build_trainer(loss: dict[str, Any], settings: TrainSettings) -> Any:
    """Build what ``train_steps`` needs of a rank's objects, with a model on the fake GPU."""
    model = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), NUM_CLASSES)
    model.to_empty(device=GPU).train()
    optimizer = build_optimizer(model, settings)
    learner = make_learner(model, optimizer, loss, settings.max_gradient_norm, settings.precision, GPU)
    return SimpleNamespace(
        job=SimpleNamespace(config=SimpleNamespace(train=settings)),
        learner=learner,
        schedule=build_schedule(optimizer, settings, NUM_STEPS),
        average=WeightAverage(model, 0.9),
        heartbeat=SimpleNamespace(update=lambda step, stage: None),
        world_rank=0,
        num_steps_done=0,
        unread=[],
    )


def draw_batches() -> Iterator[list[TrainBatch]]:
    while True:
        images, truth = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, 32, 32, dtype=torch.uint8)
        yield [TrainBatch(images, truth, ["a", "b"])] * 2


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (dict.fromkeys(LOSS_TERMS, 1.0), {"precision": "fp32", "max_gradient_norm": 1.0}),
        ({}, {"precision": "bf16", "optimizer": "sgd"}),
        ({}, {"precision": "fp16"}),
    ],
)
def test_only_reading_the_results_waits_for_the_gpu(loss: dict[str, Any], settings: dict[str, Any]) -> None:
    trainer = build_trainer(loss, TrainSettings.model_validate(settings))
    for _ in train_steps(trainer, draw_batches(), NUM_STEPS):
        pass
    assert trainer.num_steps_done == len(trainer.unread) == NUM_STEPS
    with pytest.raises((DataDependentOutputException, AssertionError)):
        read_results(trainer)


@pytest.mark.usefixtures("fake_gpu")
def test_each_way_to_wait_is_found() -> None:
    trainer = build_trainer({}, TrainSettings(precision="fp32"))
    result = train_step(trainer.learner, next(draw_batches()), lambda stage: None)
    with pytest.raises(DataDependentOutputException):
        result[0].item()
    with pytest.raises(DataDependentOutputException):
        bool(result.isnan().any())
    with pytest.raises(DynamicOutputShapeException):
        result[result > 0]
    for copy in (lambda: result.cpu(), lambda: torch.ones(2).to(GPU), lambda: result.copy_(torch.ones(2))):
        with pytest.raises(AssertionError, match="that waits"):
            copy()
    torch.ones(2).to(GPU, non_blocking=True)
