"""Boundary counts compared with step-by-step erosion, and the effect of ignored pixels and of the image's edge."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from segray.metrics import divide
from segray.models.confusion import compute_boundary_counts

NUM_CLASSES, IGNORE = 5, 255
Array = npt.NDArray[np.integer]


def erode(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Keep the pixels whose 8 neighbours are all in the region; pixels outside the image count as outside it."""
    padded = np.pad(region, 1)
    shifts = [(row, column) for row in range(3) for column in range(3)]
    height, width = region.shape
    neighbours = [padded[row : row + height, column : column + width] for row, column in shifts]
    inside: npt.NDArray[np.bool_] = np.stack(neighbours).min(0)
    return inside


def find_boundary(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels that erosion removes, repeated for 2% of the diagonal in pixels, as the paper's authors do."""
    eroded = region
    for _ in range(max(1, round(0.02 * float(np.hypot(*region.shape))))):
        eroded = erode(eroded)
    return region & ~eroded


def count(truth: Array, mask: Array, num_classes: int = NUM_CLASSES, ignore_index: int = IGNORE) -> Array:
    return compute_boundary_counts(torch.from_numpy(truth), torch.from_numpy(mask), num_classes, ignore_index).numpy()


def draw_regions(size: tuple[int, int], num_classes: int, block_px: int, seed: int) -> npt.NDArray[np.uint8]:
    blocks = np.random.default_rng(seed).integers(0, num_classes, (-(-size[0] // block_px), -(-size[1] // block_px)))
    return blocks.repeat(block_px, 0).repeat(block_px, 1)[: size[0], : size[1]].astype(np.uint8)


@pytest.mark.parametrize("size", [(20, 30), (120, 160), (97, 301), (7, 400), (1, 1), (2, 1)])
def test_boundaries_are_the_pixels_that_erosion_removes(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    truth, mask = draw_regions(size, 4, 31, seed=1), draw_regions(size, 4, 23, seed=2)
    truth[rng.random(size) < 0.002] = 3  # Specks, whose neighbours are boundary pixels.
    truth[size[0] // 3 : size[0] // 2, size[1] // 3 :] = IGNORE
    expected = np.zeros((2, NUM_CLASSES), np.int64)
    for index in range(NUM_CLASSES):
        in_truth, in_mask = (find_boundary((indices == index) & (truth != IGNORE)) for indices in (truth, mask))
        expected[:, index] = (in_truth & in_mask).sum(), (in_truth | in_mask).sum()
    got = count(truth, mask)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.int64


def test_the_boundary_of_a_square_equals_that_computed_by_hand() -> None:
    truth = np.zeros((60, 80), np.uint8)  # The diagonal is 100, so boundaries are 2 pixels wide.
    truth[20:40, 20:40] = 1
    moved = np.roll(truth, 1, axis=1)
    ring = 20**2 - 16**2
    np.testing.assert_array_equal(count(truth, truth)[:, 1], [ring, ring])
    both = 2 * 2 * 19 + 2 * 1 * 16  # The upper and lower sides without their ends, and a column of each other side.
    np.testing.assert_array_equal(count(truth, moved)[:, 1], [both, 2 * ring - both])


def test_a_class_that_fills_the_image_has_its_boundary_at_the_edge() -> None:
    whole = np.zeros((60, 80), np.uint8)
    ring = 60 * 80 - 56 * 76
    np.testing.assert_array_equal(count(whole, whole), [[ring, 0, 0, 0, 0]] * 2)


def count_by_definition(truth: Array, mask: Array, index: int) -> list[int]:
    """Count a class's boundaries pixel by pixel: is any pixel nearby ignored, outside, or of another class?"""
    distance = max(1, round(0.02 * float(np.hypot(*truth.shape))))

    def is_boundary(indices: Array, row: int, column: int) -> bool:
        if indices[row, column] != index or truth[row, column] == IGNORE:
            return False
        near = [
            (row + down, column + right)
            for down in range(-distance, distance + 1)
            for right in range(-distance, distance + 1)
        ]
        if not all(0 <= r < truth.shape[0] and 0 <= c < truth.shape[1] for r, c in near):
            return True
        return any(indices[position] != index or truth[position] == IGNORE for position in near)

    pairs = [(is_boundary(truth, *at), is_boundary(mask, *at)) for at in np.ndindex(*truth.shape)]
    return [sum(a and b for a, b in pairs), sum(a or b for a, b in pairs)]


def draw_with_void(void_share: float) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return a truth with an ignored rectangle that cuts through several classes, and the same mask without it."""
    whole = draw_regions((60, 80), 4, 17, seed=1)
    truth = whole.copy()
    side = void_share**0.5
    truth[15 : 15 + int(60 * side), 10 : 10 + int(80 * side)] = IGNORE
    return truth, whole


@pytest.mark.parametrize("void_share", [0.02, 0.1, 0.4])
def test_a_correct_mask_scores_one_beside_ignored_pixels_whatever_it_predicts_in_them(void_share: float) -> None:
    truth, mask = draw_with_void(void_share)
    void = truth == IGNORE
    expected = np.array([count_by_definition(truth, mask, index) for index in range(NUM_CLASSES)]).T
    np.testing.assert_array_equal(expected[0], expected[1])
    noise = np.random.default_rng(0).integers(0, NUM_CLASSES, truth.shape).astype(np.uint8)
    for predicted in (mask, np.where(void, 3, mask), np.where(void, 4, mask), np.where(void, noise, mask)):
        np.testing.assert_array_equal(count(truth, predicted), expected)


@pytest.mark.parametrize("void_share", [0.02, 0.4])
def test_predictions_in_ignored_pixels_change_no_count_of_a_wrong_mask(void_share: float) -> None:
    truth, whole = draw_with_void(void_share)
    mask = np.roll(whole, 2, axis=1)
    expected = np.array([count_by_definition(truth, mask, index) for index in range(NUM_CLASSES)]).T
    assert 0 < expected[0].sum() < expected[1].sum()
    np.testing.assert_array_equal(count(truth, mask), expected)
    np.testing.assert_array_equal(count(truth, np.where(truth == IGNORE, 4, mask)), expected)


def test_an_image_without_scored_pixels_has_no_counts() -> None:
    mask = draw_regions((60, 80), 3, 13, seed=2)
    np.testing.assert_array_equal(count(np.full_like(mask, IGNORE), mask), np.zeros((2, NUM_CLASSES)))


def test_boundary_iou_drops_faster_than_iou() -> None:
    truth = np.zeros((120, 160), np.uint8)
    truth[20:100, 20:100] = 1
    counts = count(truth, np.roll(truth, 2, axis=1))
    iou = (80 * 78) / (80 * 82)
    assert 0 < divide(counts[0], counts[1])[1] < 0.7 * iou
    assert np.isnan(divide(counts[0], counts[1])[2])  # A class in neither mask.


def test_more_than_256_classes_give_the_same_counts() -> None:
    truth, mask = draw_regions((60, 80), 3, 17, seed=1), draw_regions((60, 80), 3, 13, seed=2)
    truth[:5, :5] = IGNORE
    renamed = np.array([0, 1, 299], np.uint16)
    large = count(np.where(truth == IGNORE, 65_535, renamed[truth % 3]).astype(np.uint16), renamed[mask], 300, 65_535)
    np.testing.assert_array_equal(large[:, [0, 1, 299]], count(truth, mask)[:, :3])
    assert not large[:, 2:299].any()
