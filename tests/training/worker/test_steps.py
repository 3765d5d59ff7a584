"""A training step compared with plain torch, gradient accumulation, and losses that are not finite."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from segray.config import LOSS_TERMS, ModelConfig, TrainSettings
from segray.models.build import SegmentationModel, build_model
from segray.training.worker.feed import TrainBatch
from segray.training.worker.non_finite import check_result
from segray.training.worker.optimisation import build_optimizer
from segray.training.worker.steps import Learner, train_step
from tests.conftest import PET_CLASSES
from tests.training.worker.learner import IGNORE, NUM_CLASSES, build_network, make_batch, make_learner, split


@pytest.fixture
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(), PET_CLASSES.num_classes).train()


@pytest.fixture
def batch() -> TrainBatch:
    return make_batch([0], size=2, side=64)


def step(learner: Learner, *parts: TrainBatch) -> float:
    """Return the loss, NaN if the step was skipped."""
    return check_result(*train_step(learner, parts, lambda stage: None).tolist(), may_skip=True)


def compute_reference_loss(plain: nn.Module, batch: TrainBatch) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]) * 255, torch.tensor([0.229, 0.224, 0.225]) * 255
    image = ((batch.images - mean) / std).permute(0, 3, 1, 2)
    return functional.cross_entropy(plain(image), batch.truth.long(), ignore_index=IGNORE)


def test_a_step_equals_one_of_plain_torch(batch: TrainBatch) -> None:
    model = build_network()
    plain = copy.deepcopy(model)
    for parameter in model.parameters():  # Gradients of an earlier step, which must be discarded.
        parameter.grad = torch.ones_like(parameter)
    loss = step(make_learner(model, torch.optim.SGD(model.parameters(), 0.1, fused=True)), batch)
    expected = compute_reference_loss(plain, batch)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert reference.grad is not None
        torch.testing.assert_close(got, reference - 0.1 * reference.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_parts", [2, 3, 8])
@pytest.mark.parametrize("terms", [{name: 1.0} for name in LOSS_TERMS] + [{"ce": 1.0, "dice": 0.5}], ids=str)
def test_gradient_accumulation_equals_the_larger_batch(num_parts: int, terms: dict[str, float]) -> None:
    whole, in_parts = make_learner(build_network(), loss={**terms}), make_learner(build_network(), loss={**terms})
    for number in range(3):
        batch = make_batch([number], size=8)
        expected = step(whole, batch)
        assert step(in_parts, *split(batch, num_parts)) == pytest.approx(expected, rel=1e-5)
    for got, reference in zip(in_parts.replica.parameters(), whole.replica.parameters(), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-6)


def test_only_gradients_above_the_maximum_norm_are_clipped() -> None:
    norms, recorded = [], []
    for max_norm in (None, 1e6, 0.01):
        network = build_network()
        before = copy.deepcopy(network)
        learner = make_learner(
            network, torch.optim.SGD(network.parameters(), 1.0, fused=True), max_gradient_norm=max_norm
        )
        recorded.append(train_step(learner, [make_batch([0])], lambda stage: None)[1].item())
        moves = [new - old for new, old in zip(network.parameters(), before.parameters(), strict=True)]
        norms.append(torch.cat([move.flatten() for move in moves]).norm().item())
    assert norms[1] == norms[0] > 0.02
    assert norms[2] == pytest.approx(0.01, rel=1e-3)
    assert recorded == pytest.approx([norms[0]] * 3)  # Before clipping.


def test_a_non_finite_loss_changes_no_weight(model: SegmentationModel, batch: TrainBatch) -> None:
    with torch.no_grad():
        model.network.get_parameter("segmentation_head.0.bias")[0] = float("nan")
    before = [parameter.clone() for parameter in model.parameters()]
    assert math.isnan(step(make_learner(model), batch))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(7), old.nan_to_num(7))


@pytest.mark.parametrize("terms", [{name: 1.0} for name in LOSS_TERMS], ids=str)
def test_a_fully_ignored_batch_has_loss_zero_and_changes_no_weight(terms: dict[str, float]) -> None:
    network = build_network()
    before = copy.deepcopy(network)
    batch = make_batch([0])
    ignored = TrainBatch(batch.images, torch.full_like(batch.truth, IGNORE), batch.image_uris)
    assert step(make_learner(network, loss={**terms}), ignored) == 0
    for new, old in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old)


def test_stages_are_announced_in_order() -> None:
    stages: list[str] = []
    train_step(make_learner(build_network()), split(make_batch([0]), 2), stages.append)
    assert stages == ["forward", "backward", "forward", "backward", "update"]


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_non_finite_gradient_changes_no_weight_even_if_the_loss_is_finite(max_norm: float | None) -> None:
    network = build_network()
    before = copy.deepcopy(network)
    network.get_parameter("0.weight").register_hook(lambda g: g * float("inf"))  # type: ignore[no-untyped-call]
    loss, gradient_norm = train_step(
        make_learner(network, max_gradient_norm=max_norm), [make_batch([0])], lambda stage: None
    )
    assert loss.isfinite()
    assert not gradient_norm.isfinite()
    for new, old in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_step_in_half_precision_is_close_to_one_in_fp32(precision: str, dtype: torch.dtype) -> None:
    whole, half = build_network(), build_network()
    seen: set[torch.dtype] = set()
    half[2].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))  # type: ignore[index]
    expected = step(make_learner(whole), make_batch([0]))
    assert step(make_learner(half, precision=precision), make_batch([0])) == pytest.approx(expected, rel=1e-2)
    assert seen == {dtype}
    for got, reference in zip(half.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, reference, rtol=0.05, atol=5e-3)


def build_normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)).train()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_in_fp16_a_step_that_is_not_finite_is_skipped_and_the_scale_halved(broken: str) -> None:
    network = build_normalised()
    learner = make_learner(network, precision="fp16", max_gradient_norm=1.0)
    step(learner, make_batch([0]))
    before, scale = copy.deepcopy(network.state_dict()), learner.scaler.get_scale()
    if broken == "loss":  # As an overflow in the forward pass, which also breaks the BatchNorm statistics.
        hook = network[0].register_forward_hook(lambda module, inputs, output: output * float("inf"))  # type: ignore[index]
    else:
        hook = network.get_parameter("0.weight").register_hook(lambda g: g * float("inf"))  # type: ignore[no-untyped-call]
    assert math.isnan(step(learner, make_batch([1])))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert learner.scaler.get_scale() == scale / 2
    hook.remove()
    assert math.isfinite(step(learner, make_batch([2])))
    assert not torch.equal(network.get_parameter("0.weight"), before["0.weight"])


def test_in_fp16_an_infinite_loss_with_finite_gradients_is_skipped() -> None:
    network = build_network()
    learner = make_learner(network, precision="fp16")
    compute = learner.loss.sum
    learner.loss.sum = lambda logits_nchw, truth_nhw: compute(logits_nchw, truth_nhw) + float("inf")  # type: ignore[method-assign]
    before = copy.deepcopy(network.state_dict())
    assert math.isnan(step(learner, make_batch([0])))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_skipped_first_step_leaves_no_trace_in_the_optimizer(name: str) -> None:
    """In fp16 the first steps are often skipped, because the scale begins at 2^16."""
    weights = []
    for skips in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), NUM_CLASSES)
        optimizer = build_optimizer(model, TrainSettings.model_validate({"optimizer": name}))
        learner = make_learner(model, optimizer)
        model.eval()  # So that BatchNorm statistics, which a skipped step changes in fp32, play no part.
        if skips:
            hook = model.register_forward_hook(lambda module, inputs, output: output * float("nan"))
            assert math.isnan(step(learner, make_batch([0])))
            hook.remove()
        step(learner, make_batch([1]))
        step(learner, make_batch([2]))
        weights.append([parameter.detach() for parameter in model.parameters()])
    for with_skip, without in zip(weights[1], weights[0], strict=True):
        assert torch.equal(with_skip, without)
