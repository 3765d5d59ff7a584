"""Augmentation: what each setting does, image and mask stay aligned, and only the generator determines the sample."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from segray.config import AugmentationSettings
from segray.data.augmentation import FILL_RGB, Augmentation
from segray.data.images import resize_image, resize_mask

IGNORE = 255
SIZE = (120, 160)  # Height and width of the test images.
PALETTE = np.array([(0, 0, 0), (250, 30, 30), (30, 250, 30), (30, 30, 250), (250, 250, 30)], np.uint8)
ALL_CHANGES: dict[str, object] = {
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "scale": (0.5, 2.0),
    "aspect": (0.8, 1.25),
    "rotation_deg": 30.0,
    "colour_jitter": 0.4,
    "blur": 0.5,
    "cutout": 0.5,
}

Array = npt.NDArray[np.integer]
Sample = tuple[npt.NDArray[np.uint8], Array]


def build(settings: dict[str, object], image_size: tuple[int, int] = SIZE, ignore_index: int = IGNORE) -> Augmentation:
    values = {"preset": "none", **settings}
    return Augmentation(AugmentationSettings.model_validate(values), image_size, ignore_index)


def draw_blocks(dtype: npt.DTypeLike = np.uint8) -> Sample:
    """Return an image of large blocks, coloured by class, and its mask; both arrays are read-only."""
    classes = np.random.default_rng(5).integers(0, len(PALETTE), (3, 4))
    truth = classes.repeat(40, 0).repeat(40, 1).astype(dtype)
    image = PALETTE[truth]
    image.flags.writeable = truth.flags.writeable = False  # Cached samples must not be changed.
    return image, truth


def draw_coordinates() -> Sample:
    """Return an image whose red is the row and whose green is the column, and a mask of zeros."""
    rows, columns = np.indices(SIZE)
    return np.stack([rows, columns, np.zeros(SIZE)], 2).astype(np.uint8), np.zeros(SIZE, np.uint8)


def apply(augmentation: Augmentation, sample: Sample, seed: int = 0) -> Sample:
    return augmentation.apply(*sample, np.random.default_rng(seed))


def find_flat(truth: Array) -> npt.NDArray[np.bool_]:
    """Return where all pixels in an 11x11 neighbourhood have the same class; False near the edge of the sample."""
    windows = sliding_window_view(np.pad(truth.astype(np.int64), 5, constant_values=-1), (11, 11))
    flat: npt.NDArray[np.bool_] = windows.min((2, 3)) == windows.max((2, 3))
    return flat


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"horizontal_flip": 1.0},
        {"vertical_flip": 1.0},
        {"scale": (0.4, 0.9)},
        {"scale": (1.1, 3.0)},
        {"aspect": (0.5, 2.0)},
        {"rotation_deg": 180.0},
        {"cutout": 1.0},
        {"crop_size": (64, 48)},
        {"crop_size": (200, 300)},
        {"blur": 1.0},
        {**ALL_CHANGES, "colour_jitter": 0.0, "crop_size": (90, 130)},
    ],
)
@pytest.mark.parametrize(("dtype", "ignore_index"), [(np.uint8, 255), (np.uint16, 65_535)])
def test_image_and_mask_stay_aligned(
    settings: dict[str, object], dtype: type[np.unsignedinteger], ignore_index: int
) -> None:
    augmentation = build(settings, (100, 150), ignore_index)
    num_flat = 0
    for seed in range(6):
        image, truth = apply(augmentation, draw_blocks(dtype), seed)
        assert image.shape == (*(augmentation.settings.crop_size or (100, 150)), 3)
        assert truth.shape == image.shape[:2]
        assert image.dtype == np.uint8
        assert truth.dtype == dtype
        assert set(np.unique(truth)) <= {*range(len(PALETTE)), ignore_index}
        flat = find_flat(truth)
        seen, ignored = flat & (truth != ignore_index), flat & (truth == ignore_index)
        np.testing.assert_allclose(image[seen], PALETTE[truth[seen]], atol=2)
        np.testing.assert_allclose(image[ignored], np.broadcast_to(FILL_RGB, image[ignored].shape), atol=2)
        num_flat += int(seen.sum())
    assert num_flat > 0.1 * 6 * truth.size


@pytest.mark.parametrize("size", [SIZE, (60, 64), (192, 200)])
def test_without_changes_a_sample_is_resized_as_in_evaluation(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    sample = rng.integers(0, 256, (*SIZE, 3), np.uint8), rng.integers(0, 9, SIZE).astype(np.uint8)
    image, truth = apply(build({}, size), sample)
    np.testing.assert_array_equal(image, resize_image(sample[0], size))
    np.testing.assert_array_equal(truth, resize_mask(sample[1], size))


def test_augmentation_adds_no_value_to_a_mask() -> None:
    rng = np.random.default_rng(0)
    sample = rng.integers(0, 256, (*SIZE, 3), np.uint8), rng.choice([0, 2, 7], SIZE).astype(np.uint8)
    for seed in range(10):
        assert set(np.unique(apply(build(ALL_CHANGES, (90, 130)), sample, seed)[1])) <= {0, 2, 7, IGNORE}


@pytest.mark.filterwarnings("error")
def test_a_sample_depends_only_on_its_generator() -> None:
    augmentation, sample = build(ALL_CHANGES, (90, 130)), draw_blocks()
    one_by_one = [apply(augmentation, sample, seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda seed: apply(augmentation, sample, seed), range(24)))
    for before, after in zip(one_by_one, at_once, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert len({image.tobytes() for image, _ in one_by_one}) == 24


def test_flips_mirror_with_the_given_probability() -> None:
    image, truth = draw_blocks()
    got, got_truth = apply(build({"horizontal_flip": 1.0}), (image, truth))
    np.testing.assert_array_equal(got, image[:, ::-1])
    np.testing.assert_array_equal(got_truth, truth[:, ::-1])
    got, got_truth = apply(build({"vertical_flip": 1.0}), (image, truth))
    np.testing.assert_array_equal(got, image[::-1])
    np.testing.assert_array_equal(got_truth, truth[::-1])
    for name in ("horizontal_flip", "vertical_flip"):
        changed = [not np.array_equal(apply(build({name: 0.3}), (image, truth), seed)[0], image) for seed in range(200)]
        assert 0.2 < np.mean(changed) < 0.4


def test_a_scale_above_one_cuts_out_a_part_at_any_position() -> None:
    ends = []
    for seed in range(60):
        image, truth = apply(build({"scale": (2.0, 2.0)}), draw_coordinates(), seed)
        rows, columns = image[..., 0].astype(int), image[..., 1].astype(int)
        assert rows[-1, 0] - rows[0, 0] == pytest.approx(SIZE[0] / 2, abs=2)
        assert columns[0, -1] - columns[0, 0] == pytest.approx(SIZE[1] / 2, abs=2)
        assert not truth.any()
        ends.append((rows[0, 0] / SIZE[0], columns[0, 0] / SIZE[1]))
    assert np.min(ends, 0).max() < 0.05
    assert np.max(ends, 0).min() > 0.45


def test_a_scale_below_one_pads_the_image_with_ignored_pixels() -> None:
    corners = []
    for seed in range(40):
        image, truth = apply(build({"scale": (0.5, 0.5)}), draw_blocks(), seed)
        rows, columns = (np.flatnonzero((truth != IGNORE).any(axis)) for axis in (1, 0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (len(rows), len(columns)) == (60, 80)
        np.testing.assert_array_equal(image[box], resize_image(draw_blocks()[0], (60, 80)))
        np.testing.assert_array_equal(truth[box], resize_mask(draw_blocks()[1], (60, 80)))
        assert (truth == IGNORE).sum() == truth.size - 60 * 80
        assert (image[truth == IGNORE] == FILL_RGB).all()
        corners.append((rows[0] / 60, columns[0] / 80))
    assert np.min(corners, 0).max() < 0.1
    assert np.max(corners, 0).min() > 0.9


def test_scale_doubles_as_often_as_it_halves() -> None:
    shrunk = [(apply(build({"scale": (0.5, 2.0)}), draw_blocks(), seed)[1] == IGNORE).any() for seed in range(400)]
    assert 0.42 < np.mean(shrunk) < 0.58


def test_aspect_stretches_the_width_relative_to_the_height() -> None:
    image, truth = apply(build({"aspect": (4.0, 4.0)}), draw_coordinates())
    seen = image[truth != IGNORE].astype(int)
    assert np.ptp(seen[:, 1]) == pytest.approx(SIZE[1] / 2, abs=2)  # Half of the columns fill the whole width.
    assert (truth != IGNORE).any(1).sum() == SIZE[0] / 2  # All rows fill half of the height.
    assert np.ptp(seen[:, 0]) == pytest.approx(SIZE[0], abs=3)


def test_rotation_is_about_the_centre_and_within_its_limit() -> None:
    truth = np.zeros((161, 161), np.uint8)
    truth[:, 81:] = 1
    image, shifts = PALETTE[truth], []
    for seed in range(60):
        _, turned = apply(build({"rotation_deg": 10.0}, (161, 161)), (image, truth), seed)
        assert turned[80, 78] == 0
        assert turned[80, 83] == 1
        shifts.append(int((turned[20] == 1).argmax()) - 81)  # Where class 1 begins, 60 rows above the centre.
    limit = 60 * math.tan(math.radians(10))
    assert max(map(abs, shifts)) < limit + 1.5
    assert min(shifts) < -0.8 * limit
    assert max(shifts) > 0.8 * limit


def test_a_crop_is_a_window_of_the_resized_image() -> None:
    corners = []
    for seed in range(60):
        image, _ = apply(build({"crop_size": (40, 100)}), draw_coordinates(), seed)
        top, left, _ = image[0, 0].tolist()
        np.testing.assert_array_equal(image, draw_coordinates()[0][top : top + 40, left : left + 100])
        corners.append((top / 80, left / 60))
    assert np.min(corners, 0).max() < 0.1
    assert np.max(corners, 0).min() > 0.9
    # A crop of an image that is resized to half its size covers twice as many of its pixels.
    image, _ = apply(build({"crop_size": (30, 40)}, (60, 80)), draw_coordinates())
    assert np.ptp(image[..., 0]) == pytest.approx(60, abs=3)
    assert np.ptp(image[..., 1]) == pytest.approx(80, abs=3)


def test_colour_jitter_changes_brightness_contrast_and_saturation_but_not_the_mask() -> None:
    truth = np.zeros(SIZE, np.uint8)
    truth[:, 80:] = 1
    image = np.array([(130, 110, 90), (80, 80, 80)], np.uint8)[truth]

    def measure(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Return brightness, contrast at equal brightness, and saturation at equal contrast."""
        left, right = pixels[0, 0].astype(float), pixels[0, -1].astype(float)
        luma = [side @ (0.299, 0.587, 0.114) for side in (left, right)]
        spread = luma[0] - luma[1]
        return np.array([sum(luma), spread / sum(luma), (left[0] - left[2]) / spread])

    relative = []
    for seed in range(80):
        got, got_truth = apply(build({"colour_jitter": 0.5}), (image, truth), seed)
        np.testing.assert_array_equal(got_truth, truth)
        relative.append(measure(got) / measure(image))
    assert (np.min(relative, 0) > 0.42).all()
    assert (np.min(relative, 0) < 0.6).all()
    assert (np.max(relative, 0) < 1.58).all()
    assert (np.max(relative, 0) > 1.4).all()
    correlation = np.corrcoef(np.transpose(relative))
    assert np.abs(correlation - np.eye(3)).max() < 0.4  # The three are drawn independently.


def test_blur_removes_detail_with_the_given_probability() -> None:
    rng = np.random.default_rng(0)
    image, truth = rng.integers(0, 256, (*SIZE, 3), np.uint8), rng.integers(0, 4, SIZE).astype(np.uint8)
    for seed in range(5):
        blurred, got_truth = apply(build({"blur": 1.0}), (image, truth), seed)
        assert blurred.std() < 0.95 * image.std()
        assert blurred.mean() == pytest.approx(image.mean(), abs=1)
        np.testing.assert_array_equal(got_truth, truth)
    changed = [not np.array_equal(apply(build({"blur": 0.3}), (image, truth), seed)[0], image) for seed in range(100)]
    assert 0.15 < np.mean(changed) < 0.45


def test_cutout_blanks_and_ignores_one_rectangle() -> None:
    image, truth = draw_blocks()
    shares = []
    for seed in range(60):
        got, got_truth = apply(build({"cutout": 1.0}), (image, truth), seed)
        blank = got_truth == IGNORE
        rows, columns = (np.flatnonzero(blank.any(axis)) for axis in (1, 0))
        assert blank[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert (got[blank] == FILL_RGB).all()
        np.testing.assert_array_equal(got[~blank], image[~blank])
        np.testing.assert_array_equal(got_truth[~blank], truth[~blank])
        shares.append((len(rows) / SIZE[0], len(columns) / SIZE[1]))
    assert np.min(shares) == pytest.approx(0.1, abs=0.03)
    assert np.max(shares) == pytest.approx(0.4, abs=0.03)
    blanked = [(apply(build({"cutout": 0.3}), (image, truth), seed)[1] == IGNORE).any() for seed in range(200)]
    assert 0.2 < np.mean(blanked) < 0.4
