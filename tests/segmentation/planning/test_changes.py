"""Comparison of the frozen listing of a run with the present one."""

import random
from typing import Any

import pyarrow as pa
import pytest

from segray.runs.listing import ListedImage, rebatch, tabulate
from segray.schema import PLAN_SCHEMA
from segray.segmentation.planning.changes import Change, Changes, merge_listings

IMAGES = [ListedImage(name, 1, f"tag {name}", f"mask {name}", None) for name in "abcdefgh"]


def merge(
    present: list[ListedImage], retryable: set[str], batch_rows: int = 100
) -> tuple[list[tuple[ListedImage, int]], Changes]:
    frozen = pa.Table.from_pylist(
        [{**image._asdict(), "fragment": index // 3} for index, image in enumerate(IMAGES)], PLAN_SCHEMA
    )
    changes = Changes()
    batches = merge_listings(
        frozen.to_batches(max_chunksize=batch_rows), rebatch(tabulate(present), batch_rows), retryable, changes
    )
    rows = [row for batch in batches for row in batch.to_pylist()]
    return [(ListedImage(*list(row.values())[:-1]), row["fragment"]) for row in rows], changes


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 100])
def test_changes_of_the_listing_are_counted_and_the_first_one_is_named(batch_rows: int) -> None:
    new = [ListedImage("0"), ListedImage("bb"), ListedImage("z")]
    present = sorted([*IMAGES[:2], *IMAGES[3:6], IMAGES[6]._replace(etag="other"), *new])
    merged, changes = merge(present, set(), batch_rows)
    assert dict(changes.counts) == {"added": 3, "removed": 2, "changed": 1}
    assert str(changes) == "different listing: 3 added, 2 removed, 1 changed; 0 was added"
    assert [(image.uri, fragment) for image, fragment in merged] == [
        (name, index // 3) for index, name in enumerate("abcdefgh")
    ]


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 100])
def test_only_retryable_images_take_their_present_state_and_none_is_dropped(batch_rows: int) -> None:
    present = [IMAGES[0]._replace(etag="new", size_bytes=10**6), *IMAGES[2:]]
    merged, changes = merge(present, {"a", "b"}, batch_rows)
    assert changes.first is None
    assert [image for image, _ in merged] == [present[0], IMAGES[1], *IMAGES[2:]]
    assert [fragment for _, fragment in merged] == [0, 0, 0, 1, 1, 1, 2, 2]
    _, changes = merge(present, {"a"}, batch_rows)
    assert changes.first == "b was removed"


@pytest.mark.parametrize("name", [name for name in ListedImage._fields if name != "uri"])
def test_a_value_that_appears_or_disappears_is_a_change(name: str) -> None:
    values: list[Any] = [None, 7 if name == "size_bytes" else "other"]
    for value in values:
        present = [*IMAGES[:4], IMAGES[4]._replace(**{name: value}), *IMAGES[5:]]
        _, changes = merge(present, set())
        assert (changes.first == "e was changed") == (present != IMAGES)


def test_an_empty_listing_removes_all() -> None:
    merged, changes = merge([], {"a"})
    assert [image for image, _ in merged] == IMAGES
    assert dict(changes.counts) == {"removed": 7}


def test_random_listings_are_compared_as_row_by_row() -> None:
    choose = random.Random(0)
    for _ in range(50):
        now = {image.uri: image._replace(etag=choose.choice(["x", image.etag])) for image in IMAGES}
        now = {uri: image for uri, image in now.items() if choose.random() < 0.8}
        now |= {name: ListedImage(name) for name in "bdk" if choose.random() < 0.3}
        retryable = {image.uri for image in IMAGES if choose.random() < 0.5}
        merged, changes = merge([now[uri] for uri in sorted(now)], retryable, choose.randint(1, 4))
        assert [image for image, _ in merged] == [now.get(image.uri, image) for image in IMAGES]
        names = {image.uri for image in IMAGES}
        assert changes.counts[Change.ADDED] == len(now.keys() - names)
        assert changes.counts[Change.REMOVED] == len(names - now.keys() - retryable)
        different = {image.uri for image in IMAGES if now.get(image.uri, image) != image}
        assert changes.counts[Change.CHANGED] == len(different - retryable)
