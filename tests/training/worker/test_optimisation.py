"""Optimizers, schedules and the weight average, compared with plain torch and with their formulas."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from segray.config import ModelConfig, TrainSettings
from segray.models.build import SegmentationModel, build_model
from segray.training.worker.optimisation import WeightAverage, build_optimizer, build_schedule


@pytest.fixture
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), 2)


def list_rates(num_steps: int, **settings: Any) -> list[float]:
    """Return the learning rate of each step."""
    model = build_model(ModelConfig(arch="classic_unet", widths=(1, 1)), 2)
    chosen = TrainSettings(learning_rate=0.5, **settings)
    optimizer = build_optimizer(model, chosen)
    schedule = build_schedule(optimizer, chosen, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()  # The one-cycle schedule raises an error after the planned number of steps.
    return rates


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 6, 7, 10, 40])
@pytest.mark.parametrize("share", [None, 0.0, 0.3])
@pytest.mark.parametrize("schedule", ["one_cycle", "poly", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_then_only_falls(num_steps: int, schedule: str, share: float) -> None:
    rates = list_rates(num_steps, schedule=schedule, warm_up_fraction=share)
    assert all(math.isfinite(rate) and 0 < rate <= 0.5 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if num_steps >= 7:
        assert max(rates) > 0.45


def test_poly_follows_the_formula_of_deeplab() -> None:
    assert list_rates(10, schedule="poly", poly_power=0.9) == pytest.approx(
        [0.5 * (1 - s / 10) ** 0.9 for s in range(10)]
    )


def test_cosine_follows_its_formula() -> None:
    expected = [0.25 * (1 + math.cos(math.pi * s / 10)) for s in range(10)]
    assert list_rates(10, schedule="cosine") == pytest.approx(expected)


def test_constant_keeps_the_rate() -> None:
    assert list_rates(5, schedule="constant") == [0.5] * 5


def test_warm_up_is_linear_and_the_schedule_spans_the_remaining_steps() -> None:
    rates = list_rates(20, schedule="poly", warm_up_fraction=0.25, poly_power=1.0)
    assert rates[:5] == pytest.approx(np.linspace(0.005, 0.5, 6)[:5])
    assert rates[5:] == pytest.approx([0.5 * (1 - s / 15) for s in range(15)])


def test_one_cycle_rises_for_a_fifth_of_the_steps_by_default() -> None:
    assert np.argmax(list_rates(100)) == pytest.approx(20, abs=1)
    assert np.argmax(list_rates(100, warm_up_fraction=0.5)) == pytest.approx(50, abs=1)


def test_the_encoder_keeps_its_relative_rate_through_the_whole_schedule(model: SegmentationModel) -> None:
    settings = TrainSettings(learning_rate=0.5, encoder_lr_factor=0.1, schedule="cosine")
    optimizer = build_optimizer(model, settings)
    schedule = build_schedule(optimizer, settings, 8)
    encoder_ids = {id(parameter) for parameter in model.encoder.parameters()}
    for _ in range(8):
        rates = {True: set(), False: set()}  # type: dict[bool, set[float]]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[id(parameter) in encoder_ids].add(group["lr"])
        (encoder,), (decoder,) = rates[True], rates[False]
        assert encoder == pytest.approx(0.1 * decoder)
        optimizer.step()
        schedule.step()


def test_weight_decay_skips_one_dimensional_parameters_and_each_trainable_parameter_occurs_once(
    model: SegmentationModel,
) -> None:
    model.network.get_submodule("head").requires_grad_(False)
    optimizer = build_optimizer(model, TrainSettings(weight_decay=0.3))
    seen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, seen)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.3 if all(p.ndim > 1 for p in group["params"]) else 0.0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_three_steps_equal_those_of_plain_torch(model: SegmentationModel, name: str) -> None:
    plain = copy.deepcopy(model)
    settings = TrainSettings(optimizer=name, learning_rate=0.01, weight_decay=0, momentum=0.8)
    optimizer = build_optimizer(model, settings)
    reference = (
        torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=0)
        if name == "adamw"
        else torch.optim.SGD(plain.parameters(), 0.01, momentum=0.8, nesterov=True)
    )
    for step in range(3):
        image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        for network, moved in ((model, optimizer), (plain, reference)):
            moved.zero_grad()
            network(image).square().mean().backward()
            moved.step()
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_average_follows_its_formula_and_the_weights_are_restored(model: SegmentationModel) -> None:
    average = WeightAverage(model, decay=0.5)
    weight = next(model.parameters())
    expected = weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            weight.copy_(torch.full_like(weight, float(step)))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        average.update()
    own = copy.deepcopy(model.state_dict())
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_the_average_includes_batchnorm_statistics(model: SegmentationModel) -> None:
    average = WeightAverage(model, decay=0.9)
    for _ in range(30):
        model.train()(torch.randn(2, 3, 32, 32) + 5)
        average.update()
    mean = dict(model.named_buffers())["network.encoder.0.1.running_mean"]
    own = mean.clone()
    with average.applied():
        assert not torch.equal(mean, own)
        torch.testing.assert_close(mean, own, rtol=0.5, atol=0.05)


def test_a_restored_average_continues_identically(model: SegmentationModel) -> None:
    def move(step: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.sin(torch.tensor(float(step))))

    uninterrupted = WeightAverage(model, decay=0.99)
    for step in range(6):
        if step == 3:
            other = copy.deepcopy(model)
            with uninterrupted.applied():
                saved = copy.deepcopy(model.state_dict())
        move(step)
        uninterrupted.update()
    with uninterrupted.applied():
        expected = copy.deepcopy(model.state_dict())
    own = other.state_dict()
    kept = copy.deepcopy(own)
    other.load_state_dict(saved)
    restored = WeightAverage(other, decay=0.99)
    restored.reset(3)
    other.load_state_dict(kept)
    model = other
    for step in range(3, 6):
        move(step)
        restored.update()
    with restored.applied():
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("encoder_name", "parts"),
    [("tu-swin_tiny_patch4_window7_224", ["bias_table"]), ("tu-hiera_tiny_224", ["pos_embed"])],
)
def test_positional_embeddings_and_bias_tables_do_not_decay(encoder_name: str, parts: list[str]) -> None:
    import timm

    class Encoded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = timm.create_model(encoder_name.removeprefix("tu-"), features_only=True)

    with torch.device("meta"):
        model = Encoded()
    optimizer = build_optimizer(model, TrainSettings(weight_decay=0.1))  # type: ignore[arg-type]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    tables = [name for name in names if any(part in name for part in parts)]
    assert tables
    assert {names[name] for name in tables} == {0.0}
    assert {decay[id(p)] for name, p in model.named_parameters() if name.endswith("fc1.weight")} == {0.1}


def test_layers_of_the_encoder_have_decayed_rates() -> None:
    model = build_model(ModelConfig(encoder_name="tu-test_resnet"), 2)
    settings = TrainSettings(learning_rate=0.1, encoder_lr_factor=0.5, layer_decay=0.5, weight_decay=0.2)
    optimizer = build_optimizer(model, settings)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {id(parameter) for parameter in model.parameters()}
    encoder = [rates[id(parameter)] for parameter in model.encoder.parameters()]
    assert encoder == sorted(encoder)  # Its parameters are in the order of its layers.
    assert encoder[-1] == pytest.approx(0.1 * 0.5 * 0.5)
    inside = {id(parameter) for parameter in model.encoder.parameters()}
    assert {rates[id(p)] for p in model.parameters() if id(p) not in inside} == {0.1}
