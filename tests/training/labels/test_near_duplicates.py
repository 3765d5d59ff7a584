"""The perceptual hash: changed copies are found, other images are not, and no pair within the limit is missed."""

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from segray.training.labels.near_duplicates import (
    MAX_DISTANCE,
    NO_THUMBPRINT,
    THUMBPRINT,
    compute_thumbprint,
    find_near_duplicates,
)


def draw_scene(seed: int) -> Image.Image:
    """Return smooth noise of 120x160 pixels, which has details of all sizes as photographs have."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((120, 160, 3))
    for side in (4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        pixels += np.asarray(noise.resize((160, 120), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(pixels.astype(np.uint8))


def hash_images(*images: Image.Image) -> bytes:
    return b"".join(compute_thumbprint(np.asarray(image)) for image in images)


def save_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer)


@pytest.mark.parametrize(
    "change",
    [
        save_jpeg,
        lambda image: image.resize((80, 60)),
        lambda image: image.resize((640, 480)),
        lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        lambda image: Image.eval(image, lambda value: min(255, int(value * 1.03))),
    ],
)
def test_a_changed_copy_is_found_among_other_images(change: Callable[[Image.Image], Image.Image]) -> None:
    scenes = [draw_scene(seed) for seed in range(60)]
    val = [scenes[0], change(scenes[1]), change(scenes[7])]
    found, _ = find_near_duplicates(hash_images(*val), hash_images(*scenes[1:]))
    assert [(number, other) for number, other, _ in found] == [(1, 0), (2, 6)]
    assert all(distance <= MAX_DISTANCE for _, _, distance in found)


def test_images_of_one_colour_and_unreadable_ones_are_not_compared() -> None:
    flat = Image.new("RGB", (60, 40), (9, 9, 9))
    content = hash_images(flat, flat) + NO_THUMBPRINT
    assert find_near_duplicates(content, content).pairs == []
    assert find_near_duplicates(b"", hash_images(draw_scene(0))).pairs == []
    assert find_near_duplicates(hash_images(draw_scene(0)), b"").pairs == []


def build_thumbprints(count: int, rng: np.random.Generator) -> npt.NDArray[np.void]:
    thumbprints = np.zeros(count, THUMBPRINT)
    thumbprints["bits"] = rng.integers(1, 2**16, (count, 8))
    return thumbprints


def test_a_copy_in_other_colours_is_another_image() -> None:
    thumbprint = build_thumbprints(1, np.random.default_rng(0))
    for difference, is_found in ((0, True), (8, True), (9, False), (255, False)):
        other = thumbprint.copy()
        other["colour"][0, 2] = difference
        assert bool(find_near_duplicates(thumbprint.tobytes(), other.tobytes()).pairs) == is_found
        assert bool(find_near_duplicates(other.tobytes(), thumbprint.tobytes()).pairs) == is_found


@pytest.mark.parametrize("band", range(8))
def test_a_pair_that_agrees_in_one_band_only_is_found(band: int) -> None:
    thumbprint = build_thumbprints(1, np.random.default_rng(0))
    other = thumbprint.copy()
    other["bits"] ^= np.uint16(4)
    other["bits"][0, band] = thumbprint["bits"][0, band]
    assert find_near_duplicates(thumbprint.tobytes(), other.tobytes()).pairs == [(0, 0, 7)]


def test_every_pair_within_the_limit_is_found_and_none_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.training.labels.near_duplicates._MAX_PAIRS", 7)
    rng = np.random.default_rng(0)
    others = build_thumbprints(120, rng)
    copies = others[rng.choice(120, 80, replace=False)].copy()
    for copy, distance in zip(copies, rng.integers(0, 14, 80).tolist(), strict=True):
        for bit in rng.choice(128, distance, replace=False).tolist():
            copy["bits"][bit // 16] ^= np.uint16(1 << bit % 16)
    expected = {}
    for number, copy in enumerate(copies):
        distances = [sum(int(x).bit_count() for x in copy["bits"] ^ other["bits"]) for other in others]
        if min(distances) <= 7:
            expected[number] = min(distances)
    assert 20 < len(expected) < 70
    found, incomplete = find_near_duplicates(copies.tobytes(), others.tobytes())
    assert {number: distance for number, _, distance in found} == expected
    assert not len(incomplete)


def test_the_most_similar_image_is_named_and_the_first_among_equals() -> None:
    thumbprints = np.repeat(build_thumbprints(1, np.random.default_rng(0)), 4)
    thumbprints["bits"][0, 3] ^= 1
    content = thumbprints.tobytes()
    assert find_near_duplicates(content[-THUMBPRINT.itemsize :], content).pairs == [(0, 1, 0)]


@pytest.mark.parametrize(
    "margin", [(slice(None), slice(40)), (slice(None), slice(-40, None)), (slice(30), slice(None))]
)
def test_a_margin_of_one_colour_makes_no_band_equal_in_all_images(margin: tuple[slice, slice]) -> None:
    pixels = [np.asarray(draw_scene(seed)).copy() for seed in range(40)]
    for image in pixels:
        image[margin] = 0  # A quarter of the image: two columns or rows of the hash.
    content = b"".join(map(compute_thumbprint, pixels))
    bands = np.frombuffer(content, THUMBPRINT)["bits"]
    assert min(len(set(band.tolist())) for band in bands.T) > 10
    half = len(content) // 2
    assert find_near_duplicates(content[:half], content[half:]).pairs == []


def test_images_that_look_alike_in_part_are_compared_with_a_part_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.training.labels.near_duplicates._MAX_OTHERS", 10)
    rng = np.random.default_rng(0)
    others = build_thumbprints(50, rng)
    val = build_thumbprints(3, rng)
    others["bits"][:, 4] = val["bits"][:2, 4] = 77
    val[1] = others[20]  # It is found by another band, so that it is not counted.
    found = find_near_duplicates(val.tobytes(), others.tobytes())
    assert (found.pairs, found.incomplete.tolist()) == ([(1, 20, 0)], [0])
    others[30:] = val[0]  # The frames of a fixed camera are found although most of them are left out.
    found = find_near_duplicates(val[:1].repeat(20).tobytes(), others.tobytes())
    assert (found.pairs, found.incomplete.tolist()) == ([(number, 30, 0) for number in range(20)], [])
