"""One step against plain torch; evaluation against counting; a loss that is not finite moves nothing."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from segray.config import DataConfig, ModelConfig
from segray.manifest import Sample, load_splits
from segray.models.build import SegmentationModel, build_model
from segray.train.feed import TrainBatch, iterate_evaluation
from segray.train.steps import NonFiniteLossError, evaluate, train_step
from segray.transforms import Preprocessing
from tests.conftest import NUM_TEST, PET_CLASSES, SHAPE_SIZE

CPU = torch.device("cpu")


@pytest.fixture
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(), PET_CLASSES.num_classes).train()


@pytest.fixture
def batch() -> TrainBatch:
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 255], (2, 64, 64)).astype(np.uint8)
    return TrainBatch(rng.integers(0, 256, (2, 64, 64, 3), np.uint8), truth, ["a", "b"])


def step(model: SegmentationModel, optimizer: torch.optim.Optimizer, batch: TrainBatch) -> float:
    return train_step(
        model, optimizer, batch, preprocessing=Preprocessing(), ignore_index=255, device=CPU, precision="fp32"
    )


def test_a_step_is_that_of_plain_torch(model: SegmentationModel, batch: TrainBatch) -> None:
    plain = copy.deepcopy(model)
    for parameter in model.parameters():  # of a step before, which must not count again
        parameter.grad = torch.ones_like(parameter)
    loss = step(model, torch.optim.SGD(model.parameters(), 0.1), batch)
    mean, std = torch.tensor([0.485, 0.456, 0.406]) * 255, torch.tensor([0.229, 0.224, 0.225]) * 255
    image = ((torch.from_numpy(batch.images) - mean) / std).permute(0, 3, 1, 2)
    expected = functional.cross_entropy(plain(image), torch.from_numpy(batch.truth).long(), ignore_index=255)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert reference.grad is not None
        torch.testing.assert_close(got, reference - 0.1 * reference.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_moves_nothing(model: SegmentationModel, batch: TrainBatch) -> None:
    with torch.no_grad():
        model.network.get_parameter("segmentation_head.0.bias")[0] = float("nan")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(NonFiniteLossError, match="loss is nan"):
        step(model, torch.optim.SGD(model.parameters(), 0.1), batch)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(7), old.nan_to_num(7))


def test_a_batch_that_is_all_ignored_is_a_loss_of_zero(model: SegmentationModel, batch: TrainBatch) -> None:
    ignored = TrainBatch(batch.images, np.full_like(batch.truth, 255), batch.image_uris)
    assert step(model, torch.optim.SGD(model.parameters(), 0.1), ignored) == 0
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.fixture
def samples(shapes_root: Path) -> list[Sample]:
    layout = {"layout": {"oxford_iiit_pet": {"root": str(shapes_root)}}}
    return load_splits(DataConfig.model_validate(layout)).val


def count(model: SegmentationModel, samples: list[Sample], world_size: int, batch_size: int) -> torch.Tensor:
    total = torch.zeros(3, 3, dtype=torch.int64)
    for rank in range(world_size):
        batches = iterate_evaluation(
            samples,
            PET_CLASSES,
            (32, 32),  # smaller than the images: masks must still be scored at the images' own size
            batch_size=batch_size,
            world_rank=rank,
            world_size=world_size,
            num_threads=1,
        )
        total += evaluate(
            model, batches, classes=PET_CLASSES, preprocessing=Preprocessing(), device=CPU, precision="fp32"
        )
    return total


def test_evaluation_counts_do_not_depend_on_the_number_of_workers(
    model: SegmentationModel, samples: list[Sample]
) -> None:
    counts = [count(model, samples, world_size, batch_size=3) for world_size in (1, 2, 3, 4)]
    assert counts[0].sum() == NUM_TEST * SHAPE_SIZE**2
    assert counts[0].count_nonzero() > 3  # not all of one class, which would prove little
    assert all(torch.equal(counts[0], other) for other in counts[1:])
