"""Settings that only change how a model is computed must not change its losses or weights."""

import math
from collections.abc import Callable
from functools import partialmethod
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
SETTINGS: list[dict[str, bool]] = [{}, {"gradient_checkpointing": True}, {"channels_last": False}, {"compile": True}]


def run_as_worker(act: Callable[[], None]) -> None:
    """Call a function in the context of a Ray Train worker, but in this process."""
    scaling = ray.train.ScalingConfig(num_workers=0)
    ray.train.torch.TorchTrainer(lambda _: act(), train_loop_config={}, scaling_config=scaling).fit()


def build(freeze_encoder: bool) -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(arch="unet", encoder_name="tu-test_resnet", freeze_encoder=freeze_encoder), 3)


def train(freeze_encoder: bool = False, **settings: Any) -> tuple[list[float], SegmentationModel]:
    model = build(freeze_encoder)
    replica = build_replica(model, TrainSettings(**settings), CPU, "fp32").train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learner = make_learner(replica, torch.optim.SGD(parameters, 0.05, fused=True))
    batches = [[make_batch([step], side=64)] for step in range(NUM_STEPS)]
    return [train_step(learner, batch, lambda stage: None)[0].item() for batch in batches], model


def measure_distance(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(float((state[name].double() - other[name].double()).norm()) for name in other))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_compile_gradient_checkpointing_and_memory_format_do_not_change_losses_or_weights(
    freeze_encoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without generated code, which takes a minute to compile; tests/gpu/test_training.py trains with it.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    runs: list[tuple[list[float], SegmentationModel]] = []

    def train_all() -> None:
        counters.clear()
        for settings in SETTINGS:
            runs.append(train(freeze_encoder, **settings))
            assert bool(counters["stats"]["unique_graphs"]) == settings.get("compile", False)

    run_as_worker(train_all)
    before = build(freeze_encoder).state_dict()
    (plain_losses, plain), *others = runs
    expected = plain.state_dict()
    moved = measure_distance(expected, before)
    for losses, model in others:
        assert losses == pytest.approx(plain_losses, rel=1e-4)
        assert list(model.state_dict()) == list(expected)  # So checkpoints and bundles do not depend on the settings.
        # BatchNorm over few pixels amplifies rounding errors.
        assert measure_distance(model.state_dict(), expected) < 0.02 * moved
    for _, model in runs:
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        encoder = {name for name in before if name.startswith("network.encoder.")}
        assert changed >= before.keys() - encoder
        assert bool(changed & encoder) != freeze_encoder
