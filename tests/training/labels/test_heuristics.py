"""Masks with mixed values, from interpolation or JPEG, are detected and clean ones are not; equal images are found."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from segray.data.images import resize_mask
from segray.training.labels.heuristics import (
    NO_DIGEST,
    compute_mixed_share,
    compute_pixel_digest,
    find_shared_images,
    is_mixed,
)

Mask = npt.NDArray[np.integer]


def draw_ellipses(values: list[int], size: tuple[int, int] = (240, 320)) -> npt.NDArray[np.uint8]:
    """Return a mask of overlapping ellipses of the values; the first value is the background."""
    rng, image = np.random.default_rng(3), Image.new("L", size[::-1], values[0])
    for number in range(30):
        left, top, width, height = rng.integers([0, 0, 15, 15], [size[1], size[0], 90, 90]).tolist()
        ImageDraw.Draw(image).ellipse((left, top, left + width, top + height), fill=values[number % len(values)])
    return np.asarray(image)


def save_as_jpeg(mask: npt.NDArray[np.uint8]) -> Mask:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "JPEG", quality=90)
    return np.asarray(Image.open(buffer))


def interpolate(mask: npt.NDArray[np.uint8], size: tuple[int, int], resampling: Image.Resampling) -> Mask:
    return np.asarray(Image.fromarray(mask).resize(size[::-1], resampling))


# The band height is 256.
@pytest.mark.parametrize("size", [(19, 23), (255, 3), (256, 3), (257, 3), (258, 4), (600, 5)])
def test_the_mixed_share_equals_that_of_a_plain_loop(size: tuple[int, int]) -> None:
    raw = np.random.default_rng(0).choice([0, 1, 2, 7, 300], size).astype(np.uint16)
    num_edges = num_mixed = 0
    for lines in (raw.tolist(), raw.T.tolist()):
        for line in lines:
            for before, middle, after in zip(line, line[1:], line[2:], strict=False):
                if abs(after - before) > 1:
                    num_edges += 1
                    num_mixed += min(before, after) < middle < max(before, after)
    assert 0 < num_mixed < num_edges
    assert compute_mixed_share(raw) == num_mixed / num_edges
    assert compute_mixed_share(raw.T) == compute_mixed_share(raw)


@pytest.mark.parametrize("values", [[0, 255], [0, 1, 2, 3, 4], [1, 2, 3], [10, 200, 90]])
def test_clean_masks_are_not_reported(values: list[int]) -> None:
    mask = draw_ellipses(values)
    assert not is_mixed(mask)
    for size in ((120, 160), (100, 90), (431, 700)):
        assert not is_mixed(resize_mask(mask, size))
    assert not is_mixed(resize_mask(mask.astype(np.uint16) * 200, (150, 200)))


def test_an_outline_with_an_intermediate_value_is_not_reported() -> None:
    image = Image.fromarray(draw_ellipses([0, 255]))
    # The outline is 1 pixel wide, as thin as mixed values are.
    ImageDraw.Draw(image).ellipse((50, 40, 110, 100), fill=255, outline=128)
    assert 0 < compute_mixed_share(np.asarray(image)) < 0.2
    assert not is_mixed(np.asarray(image))


@pytest.mark.parametrize("values", [[0, 255], [0, 40, 80, 120], [10, 200, 90]])
@pytest.mark.parametrize("resampling", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_interpolated_masks_are_reported(values: list[int], resampling: Image.Resampling) -> None:
    for size in ((120, 160), (100, 90), (431, 700)):
        assert is_mixed(interpolate(draw_ellipses(values), size, resampling))


@pytest.mark.parametrize("values", [[0, 128], [0, 40, 80, 120], [10, 200, 90]])
def test_masks_saved_as_jpeg_are_reported(values: list[int]) -> None:
    assert is_mixed(save_as_jpeg(draw_ellipses(values)))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 500), (500, 2)])
def test_masks_too_small_to_have_neighbours_are_not_reported(size: tuple[int, int]) -> None:
    assert not is_mixed(np.arange(size[0] * size[1], dtype=np.uint16).reshape(size) % 2 * 9)


def test_masks_with_too_few_edges_have_share_0() -> None:
    ramp = np.tile(np.arange(0, 15, 5, dtype=np.uint8), (99, 1))  # 99 edges, all of them mixed.
    assert compute_mixed_share(ramp) == 0
    assert compute_mixed_share(np.vstack([ramp, ramp[:1]])) == 1


def test_a_digest_depends_only_on_pixels_and_size() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    digest = compute_pixel_digest(image)
    assert len(digest) == len(NO_DIGEST)
    assert compute_pixel_digest(np.asfortranarray(image)) == digest
    changed = image.copy()
    changed[5, 7, 2] ^= 1
    others = [changed, image.reshape(8, 6, 3), image.reshape(4, 12, 3), image[::-1]]
    assert len({digest, *map(compute_pixel_digest, others)}) == 1 + len(others)


def test_shared_images_are_paired_with_the_first_equal_one() -> None:
    a, b, c, d = (compute_pixel_digest(np.full((2, 2, 3), value, np.uint8)) for value in range(4))
    others = NO_DIGEST + a + b + b + c
    assert find_shared_images(d + c + NO_DIGEST + b + c, others) == [(1, 4), (3, 2), (4, 4)]
    assert find_shared_images(b"", others) == []
    assert find_shared_images(others, b"") == []
