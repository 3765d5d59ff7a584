"""Scores compared with brute force and torchmetrics, with absent classes and ignored pixels."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from segray.metrics import (
    PixelCounts,
    compute_accuracy,
    compute_defined_mean,
    compute_dice,
    compute_iou,
    compute_precision,
    compute_recall,
    count_from_confusion,
    to_nullable,
)
from segray.models.confusion import compute_confusion

NUM_CLASSES, IGNORE = 5, 255
ABSENT = 4  # A class that is in neither truth nor mask.


@pytest.fixture
def pair() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(1)
    truth = rng.choice([0, 1, 2, IGNORE], (3, 31, 17)).astype(np.uint8)
    mask = rng.choice([0, 1, 2, 3], truth.shape).astype(np.uint8)  # Class 3 is predicted but never true.
    return truth, mask


def count(truth: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]) -> PixelCounts:
    confusion = compute_confusion(torch.from_numpy(truth), torch.from_numpy(mask), NUM_CLASSES, IGNORE)
    return count_from_confusion(confusion.numpy())


def test_counts_equal_brute_force(pair: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]) -> None:
    expected = {name: [0] * NUM_CLASSES for name in PixelCounts._fields}
    for true, predicted in zip(pair[0].ravel().tolist(), pair[1].ravel().tolist(), strict=True):
        if true == IGNORE:
            continue
        if true == predicted:
            expected["tp_px"][true] += 1
        else:
            expected["fn_px"][true] += 1
            expected["fp_px"][predicted] += 1
    assert {name: value.tolist() for name, value in count(*pair)._asdict().items()} == expected


def test_scores_equal_torchmetrics(pair: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]) -> None:
    truth, mask = (torch.from_numpy(array).long() for array in pair)
    expected = multiclass_confusion_matrix(mask, truth, NUM_CLASSES, ignore_index=IGNORE)
    assert torch.equal(compute_confusion(truth, mask, NUM_CLASSES, IGNORE), expected)
    iou = compute_iou(count(*pair))
    jaccard = multiclass_jaccard_index(mask, truth, NUM_CLASSES, average=None, ignore_index=IGNORE).numpy()
    np.testing.assert_allclose(iou[:ABSENT], jaccard[:ABSENT], rtol=1e-6)


def test_accuracy_equals_binary_accuracy_of_each_class_against_the_rest(
    pair: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]],
) -> None:
    truth, mask = (torch.from_numpy(array) for array in pair)
    got = compute_accuracy(compute_confusion(truth, mask, NUM_CLASSES, IGNORE).numpy())
    scored = truth != IGNORE
    for index in range(NUM_CLASSES):
        one_against_rest = (mask[scored] == index).int(), (truth[scored] == index).int()
        assert got[index] == pytest.approx(binary_accuracy(*one_against_rest).item(), rel=1e-6)
    assert got[ABSENT] == 1
    assert np.isnan(compute_accuracy(np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64))).all()


def test_undefined_scores_are_null_and_excluded_from_means(
    pair: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]],
) -> None:
    counts = count(*pair)
    iou, dice = compute_iou(counts), compute_dice(counts)
    assert to_nullable(iou)[ABSENT] is None
    assert to_nullable(dice)[ABSENT] is None
    assert iou[3] == 0  # Class 3 is predicted but never true, so its score is 0, not undefined.
    assert np.isnan(compute_recall(counts)[3])
    assert compute_precision(counts)[3] == 0
    assert compute_defined_mean(iou) == pytest.approx(iou[:ABSENT].mean(), abs=1e-12)
    assert np.isnan(compute_defined_mean(np.array([np.nan])))


def test_dice_follows_from_iou(pair: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]) -> None:
    counts = count(*pair)
    iou, dice = compute_iou(counts)[:ABSENT], compute_dice(counts)[:ABSENT]
    np.testing.assert_allclose(dice, 2 * iou / (1 + iou), rtol=1e-12)


def test_a_perfect_mask_scores_one_and_an_ignored_image_is_undefined() -> None:
    truth = np.arange(4, dtype=np.uint8).reshape(2, 2)
    np.testing.assert_array_equal(compute_iou(count(truth, truth)), [1, 1, 1, 1, np.nan])
    ignored = np.full((2, 2), IGNORE, np.uint8)
    assert np.isnan(compute_iou(count(ignored, truth))).all()


def test_confusion_counts_more_than_256_classes() -> None:
    rng = np.random.default_rng(2)
    truth = rng.choice([0, 299, 65_535], (40, 50)).astype(np.uint16)
    mask = rng.integers(0, 300, (40, 50))
    got = compute_confusion(torch.from_numpy(truth), torch.from_numpy(mask), 300, 65_535)
    expected = np.zeros((300, 300), np.int64)
    np.add.at(expected, (truth[truth < 300].astype(np.int64), mask[truth < 300]), 1)
    np.testing.assert_array_equal(got.numpy(), expected)
