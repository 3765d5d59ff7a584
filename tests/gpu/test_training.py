"""One training rank on the device, compared with the CPU: each precision, torch.compile, losses and evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segray.config import LOSS_TERMS, LossSettings
from segray.data.preprocessing import Preprocessing
from segray.models.build import build_model
from segray.models.losses import SegmentationLoss
from segray.models.precision import has_bf16
from segray.training.worker.evaluation import compute_loss, evaluate
from segray.training.worker.feed import EvalBatch
from tests.conftest import PET_CLASSES
from tests.gpu.conftest import needs_cuda
from tests.gpu.one_rank import MODEL, Trained, draw_batch, measure_distance, train, train_without_waiting
from tests.training.worker.learner import IGNORE

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
NUM_STEPS = 8
TOLERANCES = {"fp32": 1e-2, "bf16": 5e-2, "fp16": 2e-2}  # In fp32, cuDNN convolves in TF32.


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(CPU, tmp_path_factory.mktemp("cpu"), num_steps=NUM_STEPS, precision="fp32")


@pytest.mark.parametrize("precision", TOLERANCES)
def test_each_precision_trains_as_the_cpu_does(
    precision: str, device: torch.device, on_cpu: Trained, tmp_path: Path
) -> None:
    trained = train(device, tmp_path, num_steps=NUM_STEPS, precision=precision)
    assert trained.device_type == device.type
    assert trained.precision == ("fp32" if precision == "bf16" and not has_bf16(device) else precision)
    expected_dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[trained.precision]
    assert trained.logits_dtype == expected_dtype
    assert trained.losses[0] == pytest.approx(on_cpu.losses[0], rel=TOLERANCES[precision])
    assert trained.losses[-1] < 0.9 * trained.losses[0]
    assert all(np.isfinite(value).all() for value in trained.weights.values())


def test_fp16_gradients_are_scaled(device: torch.device, tmp_path: Path) -> None:
    trained = train(device, tmp_path, num_steps=2, precision="fp16")
    assert trained.loss_scale > 1
    assert train(device, tmp_path, num_steps=1, precision="fp32").loss_scale == 1


def test_a_compiled_network_trains_as_the_plain_one_does(device: torch.device, tmp_path: Path) -> None:
    plain, compiled = (
        train(device, tmp_path, num_steps=3, precision="fp32", optimizer="sgd", compile=is_compiled)
        for is_compiled in (False, True)
    )
    assert compiled.losses == pytest.approx(plain.losses, rel=TOLERANCES["fp32"])
    first = train(device, tmp_path, num_steps=1, precision="fp32", learning_rate=1e-12)
    assert measure_distance(compiled.weights, plain.weights) < 0.2 * measure_distance(plain.weights, first.weights)


@needs_cuda
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "max_gradient_norm": 1.0}], ids=str)
def test_no_step_waits_for_the_gpu(
    settings: dict[str, Any], precision: str, device: torch.device, tmp_path: Path
) -> None:
    losses = train_without_waiting(device, tmp_path, precision=precision, ema_decay=0.9, **settings)
    assert len(losses) == 4
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("term", LOSS_TERMS)
def test_each_loss_and_its_gradient_equal_those_of_the_cpu(term: str, device: torch.device) -> None:
    settings, class_weights = LossSettings.model_validate({term: 1.0}), np.array([0.5, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 24, 20, generator=generator)
    truth = torch.randint(0, 3, (2, 24, 20), generator=generator)
    truth[:, :3] = IGNORE
    values, gradients = [], []
    for where in (CPU, device):
        loss = SegmentationLoss(settings, IGNORE, class_weights, where)
        leaf = logits.to(where, copy=True).requires_grad_()
        counts = loss.count(truth.to(where))
        value = loss.combine(loss.sum(leaf, truth.to(where)), counts)
        value.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        values.append(value.item())
        gradients.append(leaf.grad.cpu())
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_evaluation_counts_and_loss_equal_those_of_the_cpu(device: torch.device, on_cpu: Trained) -> None:
    batch = draw_batch()
    split = EvalBatch(batch.images, list(batch.truth.numpy()), batch.truth, list(range(len(batch.images))))
    confusions, losses = [], []
    for where in (CPU, device):
        model = build_model(MODEL, PET_CLASSES.num_classes)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in on_cpu.weights.items()})
        loss = SegmentationLoss(LossSettings(), PET_CLASSES.ignore_index, None, where)
        counts = evaluate(
            model.to(where),
            [split],
            classes=PET_CLASSES,
            preprocessing=Preprocessing(),
            loss=loss,
            precision="fp32",
        )
        confusions.append(counts.confusion.cpu())
        losses.append(compute_loss(counts, loss))
    assert confusions[1].sum() == batch.truth.numel()
    assert (confusions[1] - confusions[0]).abs().sum() < 0.01 * batch.truth.numel()
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
