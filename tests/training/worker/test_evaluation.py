"""Scores of a split compared with direct counting, and identical for any number of workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from segray.config import DataConfig, LossSettings, ModelConfig
from segray.data.manifest import load_splits
from segray.data.preprocessing import Preprocessing
from segray.data.sample_list import Sample
from segray.models.build import SegmentationModel, build_model
from segray.models.losses import SegmentationLoss
from segray.training.worker.evaluation import (
    _FIXED_POINT,
    NUM_EXTREMES,
    EvaluationCounts,
    compute_loss,
    compute_scores,
    evaluate,
    pool_scores,
)
from segray.training.worker.feed import RankShare, iterate_evaluation
from segray.training.worker.sample_store import SampleStore, load_labelled_image
from tests.conftest import NUM_TEST, PET_CLASSES, SHAPE_SIZE

LOSS = SegmentationLoss(LossSettings(ce=1.0, dice=0.5), PET_CLASSES.ignore_index, np.array([1.0, 0.3, 2.0]))
SMALL = (32, 32)  # Smaller than the images, at whose size the masks must still be scored.


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(), PET_CLASSES.num_classes)


@pytest.fixture(scope="module")
def samples(shapes_root: Path) -> list[Sample]:
    layout = {"layout": {"oxford_iiit_pet": {"root": str(shapes_root)}}}
    return list(load_splits(DataConfig.model_validate(layout)).val)


def count(model: SegmentationModel, samples: list[Sample], world_size: int, rank: int, batch_size: int = 3) -> Any:
    batches = iterate_evaluation(
        samples,
        SampleStore(PET_CLASSES, 0),
        SMALL,
        batch_size,
        RankShare(rank, world_size),
    )
    return evaluate(model, batches, classes=PET_CLASSES, preprocessing=Preprocessing(), loss=LOSS, precision="fp32")


@pytest.fixture(scope="module")
def counts(model: SegmentationModel, samples: list[Sample]) -> EvaluationCounts:
    found: EvaluationCounts = count(model, samples, 1, 0)
    return found


@pytest.fixture(scope="module")
def pairs(
    model: SegmentationModel, samples: list[Sample]
) -> list[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]:
    """Ground truth and predicted mask of each image, computed one at a time."""
    found = []
    for sample in samples:
        _, truth = load_labelled_image(sample, PET_CLASSES)
        batch = next(iterate_evaluation([sample], SampleStore(PET_CLASSES, 0), SMALL, 1, RankShare()))
        with torch.no_grad():
            logits = model.eval()(Preprocessing().apply(batch.images))
        large = functional.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False)
        found.append((truth, large[0].argmax(0).numpy()))
    return found


def test_the_confusion_matrix_counts_every_pixel_once(
    counts: EvaluationCounts, pairs: list[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]
) -> None:
    expected = np.zeros((3, 3), np.int64)
    for truth, mask in pairs:
        scored = truth != PET_CLASSES.ignore_index
        np.add.at(expected, (truth[scored], mask[scored]), 1)
    np.testing.assert_array_equal(counts.confusion.numpy(), expected)
    assert expected.sum() == NUM_TEST * SHAPE_SIZE**2
    assert np.count_nonzero(expected) > 3  # Predictions of several classes, or the test would prove little.


def test_image_scores_and_the_best_and_worst_images(
    counts: EvaluationCounts, pairs: list[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]
) -> None:
    ious = np.full((len(pairs), 3), np.nan)
    dices = ious.copy()
    for number, (truth, mask) in enumerate(pairs):
        for index in range(3):
            both, either = ((truth == index) & (mask == index)).sum(), ((truth == index) | (mask == index)).sum()
            if either:
                ious[number, index] = both / either
                dices[number, index] = 2 * both / (both + either)
    scores = compute_scores(counts)
    np.testing.assert_allclose(scores["val_mean_image_iou"], np.nanmean(ious, 0), rtol=1e-9)
    np.testing.assert_allclose(scores["val_mean_image_dice"], np.nanmean(dices, 0), rtol=1e-9)
    assert scores["val_image_iou"] == pytest.approx(np.nanmean(np.nanmean(ious, 0)))
    by_score = np.argsort(np.nanmean(ious, 1))
    assert [number for _, number in scores["val_worst_images"]] == by_score[:NUM_EXTREMES].tolist()
    assert [number for _, number in scores["val_best_images"]] == by_score[::-1][:NUM_EXTREMES].tolist()
    assert scores["val_worst_images"][0][0] == pytest.approx(np.nanmean(ious, 1).min())


def test_scores_follow_their_formulas() -> None:
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # The third class does not occur.
    zeros = torch.zeros((2, 3), dtype=torch.int64)
    boundary = torch.tensor([[1, 2, 0], [4, 3, 0]])
    scores = compute_scores(EvaluationCounts(confusion, boundary, zeros, zeros[0], [], [], zeros))
    assert scores["val_dataset_iou"] == [6 / 9, 3 / 6, None]
    assert scores["val_dataset_dice"] == [12 / 15, 6 / 9, None]
    assert scores["val_precision"] == [6 / 7, 3 / 5, None]
    assert scores["val_recall"] == [6 / 8, 3 / 4, None]
    assert scores["val_accuracy"] == [9 / 12, 9 / 12, 1.0]
    assert scores["val_boundary_iou"] == [1 / 4, 2 / 3, None]
    assert scores["val_mean_iou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert scores["val_mean_boundary_iou"] == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert scores["val_pixel_accuracy"] == 9 / 12
    assert scores["val_confusion"] == confusion.tolist()
    assert scores["val_mean_image_iou"] == [None, None, None]


def test_pooled_scores_of_parts_equal_those_of_the_whole_split(
    model: SegmentationModel, samples: list[Sample], counts: EvaluationCounts
) -> None:
    parts = [compute_scores(count(model, part, 1, 0)) for part in (samples[:3], samples[3:4], samples[4:])]
    pooled, whole = pool_scores(json.loads(json.dumps(parts))), compute_scores(counts)
    for name in pooled.keys() - {"val_best_images", "val_worst_images"}:
        assert pooled[name] == whole[name], name
    assert pooled["val_best_images"] == []


def test_scores_of_ten_million_images_are_pooled_without_overflow() -> None:
    num_images = 5_000_000
    part = {
        "val_confusion": [[1, 0], [0, 1]],
        "val_boundary_px": [[1, 1], [1, 1]],
        "val_image_sums": [[_FIXED_POINT * num_images] * 2] * 2,
        "val_image_count": [num_images] * 2,
    }
    pooled = pool_scores([part, part])
    assert pooled["val_image_iou"] == pooled["val_image_dice"] == 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 9])
def test_counts_of_the_shares_sum_to_those_of_the_whole_split(
    model: SegmentationModel, samples: list[Sample], counts: EvaluationCounts, world_size: int
) -> None:
    shares = [count(model, samples, world_size, rank) for rank in range(world_size)]
    for name in ("confusion", "boundary", "image_sums", "image_count", "loss"):
        total = sum(getattr(share, name) for share in shares)
        assert torch.equal(total, getattr(counts, name)), name


def test_counts_do_not_depend_on_padding_and_batch_size(
    model: SegmentationModel, samples: list[Sample], counts: EvaluationCounts
) -> None:
    other = count(model, samples, 1, 0, batch_size=5)
    assert torch.equal(other.confusion, counts.confusion)
    assert other.worst == counts.worst
    assert compute_loss(other, LOSS) == pytest.approx(compute_loss(counts, LOSS), rel=1e-6)


def test_the_loss_is_that_of_the_whole_split_as_one_batch(
    model: SegmentationModel, samples: list[Sample], counts: EvaluationCounts
) -> None:
    batch = next(iterate_evaluation(samples, SampleStore(PET_CLASSES, 0), SMALL, NUM_TEST, RankShare()))
    with torch.no_grad():
        logits = model.eval()(Preprocessing().apply(batch.images))
    truth = torch.from_numpy(np.stack(batch.truths)[:, 1::2, 1::2]).long()  # The pixels at the centres of the smaller.
    entropy = functional.cross_entropy(logits, truth, torch.tensor([1.0, 0.3, 2.0]), ignore_index=255)
    dices = []
    for probability, image_truth in zip(logits.softmax(1), truth, strict=True):
        present = [index for index in range(3) if (image_truth == index).any()]
        scored = image_truth != 255
        parts = [(probability[index] * scored, (image_truth == index).float()) for index in present]
        dices.append(torch.stack([1 - 2 * (p * t).sum() / (p.sum() + t.sum()) for p, t in parts]).mean())
    assert compute_loss(counts, LOSS) == pytest.approx(float(entropy + 0.5 * torch.stack(dices).mean()), rel=1e-5)


def test_a_loss_that_is_not_finite_is_undefined(counts: EvaluationCounts, samples: list[Sample]) -> None:
    torch.manual_seed(0)
    broken = build_model(ModelConfig(arch="classic_unet", widths=(2, 2)), PET_CLASSES.num_classes)
    with torch.no_grad():
        broken.network.get_parameter("head.bias").fill_(torch.nan)
    assert compute_loss(count(broken, samples[:2], 1, 0), LOSS) is None
