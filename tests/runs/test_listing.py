"""Listings as record batches: their hash, batch sizes and storage."""

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest

from segray.runs.listing import LISTING_SCHEMA, ListedImage, rebatch, spool_listing, tabulate

UNUSUAL = ['/d/"q\\.png', "/d/ü😀.png", "s3://b/ \t.png", "\u007f", "\u2028", "\x01", "", "a\nb", "'", "/plain.png"]


def make_images() -> list[ListedImage]:
    texts = random.Random(0)
    choose = [None, *UNUSUAL]
    return [
        ListedImage(uri, number, texts.choice(choose), texts.choice(choose), texts.choice(choose))
        for number, uri in enumerate(UNUSUAL * 20)
    ]


@pytest.mark.parametrize(
    "images",
    [
        make_images(),
        [ListedImage(f"/plain/{number}.png") for number in range(100)],
        [ListedImage(f"/plain/{number}.png", number, f"tag{number}") for number in range(100)],
        [ListedImage("/a", 2**62, "", None, None), ListedImage("/b", None, "t", "/m", None)],
        [],
    ],
)
@pytest.mark.parametrize("batch_rows", [1, 7, 2**16])
def test_the_hash_of_a_listing_is_that_of_its_rows_as_json(
    images: list[ListedImage], batch_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.runs.listing.BATCH_ROWS", batch_rows)
    listing = spool_listing(tabulate(images), tmp_path / "listing")
    assert listing.sha256 == hashlib.sha256("".join(json.dumps(image) for image in images).encode()).hexdigest()
    assert listing.num_images == len(images)
    assert [ListedImage(**row) for batch in listing.read() for row in batch.to_pylist()] == images


@pytest.mark.parametrize("sizes", [[3, 3, 3], [10], [1] * 9, [4, 0, 5], [], [0]])
def test_batches_are_regrouped_without_loss(sizes: list[int]) -> None:
    names = iter(range(100))
    batches = [
        pa.concat_batches(
            [pa.RecordBatch.from_pylist([], LISTING_SCHEMA), *tabulate([ListedImage(f"{next(names):03}")])]
        )
        if size == 1
        else pa.RecordBatch.from_pylist([{"uri": f"{next(names):03}"} for _ in range(size)], LISTING_SCHEMA)
        for size in sizes
    ]
    grouped = list(rebatch(batches, 4))
    assert [batch.num_rows for batch in grouped[:-1]] == [4] * (len(grouped) - 1)
    assert all(0 < batch.num_rows <= 4 for batch in grouped)
    assert [uri for batch in grouped for uri in batch["uri"].to_pylist()] == [f"{n:03}" for n in range(sum(sizes))]
