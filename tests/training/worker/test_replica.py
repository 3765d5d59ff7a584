"""Settings that only change how a model is computed must not change its losses or weights."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch
from torch._dynamo.utils import counters

from segray.config import ModelConfig, TrainSettings
from segray.models.build import SegmentationModel, build_model
from segray.training.worker.replica import build_replica
from segray.training.worker.steps import train_step
from tests.training.worker.learner import CPU, make_batch, make_learner

NUM_STEPS = 3


def run_as_worker(act: Callable[[], None]) -> None:
    """Call a function in the context of a Ray Train worker, but in this process."""
    scaling = ray.train.ScalingConfig(num_workers=0)
    ray.train.torch.TorchTrainer(lambda _: act(), train_loop_config={}, scaling_config=scaling).fit()


def build(freeze_encoder: bool) -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(arch="unet", encoder_name="resnet18", freeze_encoder=freeze_encoder), 3)


def train(freeze_encoder: bool = False, **settings: Any) -> tuple[list[float], SegmentationModel]:
    model = build(freeze_encoder)
    replica = build_replica(model, TrainSettings(**settings), CPU).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learner = make_learner(replica, torch.optim.SGD(parameters, 0.05))
    return [train_step(learner, [make_batch([step], side=64)], lambda stage: None) for step in range(NUM_STEPS)], model


def measure_distance(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(float((state[name].double() - other[name].double()).norm()) for name in other))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize(
    "settings", [{"compile": True}, {"gradient_checkpointing": True}, {"channels_last": False}], ids=str
)
def test_compile_gradient_checkpointing_and_memory_format_do_not_change_losses_or_weights(
    settings: dict[str, bool], freeze_encoder: bool
) -> None:
    runs: list[tuple[list[float], SegmentationModel]] = []
    counters.clear()
    run_as_worker(lambda: runs.append(train(freeze_encoder)))
    assert not counters["stats"]
    run_as_worker(lambda: runs.append(train(freeze_encoder, **settings)))
    assert bool(counters["stats"]["unique_graphs"]) == settings.get("compile", False)
    (plain_losses, plain), (losses, model) = runs
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)  # So checkpoints and bundles do not depend on these settings.
    moved = measure_distance(expected, build(freeze_encoder).state_dict())
    assert measure_distance(state, expected) < 0.02 * moved  # BatchNorm over few pixels amplifies rounding errors.


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("settings", [{}, {"compile": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_frozen_encoder_stays_identical_while_the_rest_learns(settings: dict[str, bool]) -> None:
    runs: list[SegmentationModel] = []
    run_as_worker(lambda: runs.append(train(freeze_encoder=True, **settings)[1]))
    before = build(freeze_encoder=True).state_dict()
    changed = {name for name, value in runs[0].state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith("network.encoder.")}
