"""Division of a listing into fragments."""

import random

import pytest

from segray.config import SegmentSettings
from segray.runs.listing import ListedImage, rebatch, tabulate
from segray.segmentation.planning.cut import FragmentLimits, cut_fragments

SIZES_BYTES = {"a": 30, "b": 30, "c": 40, "d": 1, "e": 500, "f": 1, "g": 1, "h": 1}
IMAGES = [ListedImage(name, size) for name, size in SIZES_BYTES.items()]


def cut(images: list[ListedImage], limits: FragmentLimits, batch_rows: int = 100) -> list[int]:
    batches = cut_fragments(rebatch(tabulate(images), batch_rows), limits)
    return [fragment for batch in batches for fragment in batch["fragment"].to_pylist()]


def cut_one_by_one(images: list[ListedImage], limits: FragmentLimits) -> list[int]:
    fragment, num_images, num_bytes, fragments = 0, 0, 0, []
    for image in images:
        size = image.size_bytes or 0
        is_full = num_images == limits.get_num_images(fragment) or num_bytes + size > limits.num_bytes
        if num_images and is_full:
            fragment, num_images, num_bytes = fragment + 1, 0, 0
        fragments.append(fragment)
        num_images, num_bytes = num_images + 1, num_bytes + size
    return fragments


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
@pytest.mark.parametrize(
    ("num_images", "num_bytes", "expected"),
    [
        (3, 10**6, ["abc", "def", "gh"]),
        (8, 100, ["abc", "d", "e", "fgh"]),  # exactly 100 bytes fit; a larger image has its own fragment
        (2, 60, ["ab", "cd", "e", "fg", "h"]),
        (8, 1, ["a", "b", "c", "d", "e", "f", "g", "h"]),
    ],
)
def test_fragments_keep_both_limits(num_images: int, num_bytes: int, expected: list[str], batch_rows: int) -> None:
    fragments: dict[int, str] = {}
    for image, fragment in zip(IMAGES, cut(IMAGES, FragmentLimits(num_images, num_bytes), batch_rows), strict=True):
        fragments[fragment] = fragments.get(fragment, "") + image.uri
    assert list(fragments.items()) == list(enumerate(expected))


def test_images_of_unknown_size_are_divided_by_count() -> None:
    images = [ListedImage(str(number)) for number in range(5)]
    assert cut(images, FragmentLimits(2, 100)) == [0, 0, 1, 1, 2]


def test_the_fragments_do_not_depend_on_the_batches() -> None:
    choose = random.Random(0)
    for _ in range(100):
        images = [ListedImage(f"{n:03}", choose.choice([None, 0, 1, 5, 30, 200])) for n in range(200)]
        limits = FragmentLimits(choose.randint(1, 100), choose.randint(1, 100), choose.randint(0, 3))
        assert cut(images, limits, choose.randint(1, 50)) == cut_one_by_one(images, limits)


@pytest.mark.parametrize(
    ("num_images", "settings", "expected"),
    [
        (1, {}, 8),
        (256, {}, 8),
        (257, {}, 9),
        (2017, {}, 64),
        (1_280_000, {}, 64),
        (1_280_001, {}, 65),
        (100_000_000, {"fragment_px": 2**40}, 5000),
        (100_000_000, {}, 2**26 // (352 * 480)),  # pixels win
        (100, {"fragment_size": 1000}, 397),
        (100_000_000, {"fragment_size": 7}, 7),
        (100, {"fragment_px": 1}, 1),
    ],
)
def test_the_number_of_images_follows_from_the_listing_and_the_model(
    num_images: int, settings: dict[str, int], expected: int
) -> None:
    limits = FragmentLimits.resolve(SegmentSettings.model_validate(settings), (352, 480), num_images)
    assert limits.num_images == expected
    assert limits.num_bytes == 64 * 2**20
    assert (limits.num_small > 0) == ("fragment_size" not in settings)


def test_with_auto_the_first_fragments_are_small() -> None:
    limits = FragmentLimits.resolve(SegmentSettings(fragment_px=2**40), (352, 480), 10_000_000)
    sizes = [0] * 200
    for fragment in cut([ListedImage(str(number)) for number in range(10_000)], limits):
        sizes[fragment] += 1
    assert sizes[:64] == [64] * 64
    assert sizes[64:75] == [500] * 11
