"""The images of a soak: many names for a thousand distinct tiny files, with a broken one at regular intervals."""

import io
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.poison import build_poison

_NUM_DISTINCT = 1000
_PER_FOLDER = 10_000
_MAX_SIDE_PX = 64
_FORMATS = (
    *(("PNG", mode, "png") for mode in ("L", "RGB", "P", "RGBA", "1")),
    ("JPEG", "RGB", "jpg"),
    ("JPEG", "L", "jpeg"),
    ("WEBP", "RGB", "webp"),
    ("BMP", "RGB", "bmp"),
    ("GIF", "P", "gif"),
    ("TIFF", "RGB", "tif"),
    ("TIFF", "L", "tiff"),
)


@dataclass(frozen=True)
class SoakImage:
    """One image.

    Attributes:
        key: Path below the folder of images.
        number: Number of its content among the distinct ones.
        kind: ``error_kind`` of its row; None if it can be decoded.
    """

    key: str
    number: int
    kind: str | None


@dataclass(frozen=True)
class ImageSet:
    """The images, which are the same on each call.

    Attributes:
        num_images: Number of images.
        broken_every: One of so many images is broken, each time in the next one of all known ways.
    """

    num_images: int
    broken_every: int

    @cached_property
    def contents(self) -> list[tuple[str, bytes, str | None]]:
        """The distinct files: extension, content and ``error_kind``; the broken ones are at the end."""
        poison = [(item.name.rpartition(".")[2], item.content, item.kind) for item in build_poison()]
        odd = [(extension, content, None) for extension, content, kind in poison if kind is None]
        broken = [(extension, content, str(kind)) for extension, content, kind in poison if kind is not None]
        return [*_encode_distinct(_NUM_DISTINCT - len(odd)), *odd, *broken]

    def iterate(self, first: int = 0, end: int | None = None) -> Iterator[SoakImage]:
        """Yield the images from number ``first`` to ``end``, in the order of their keys."""
        num_broken = len(self.contents) - _NUM_DISTINCT
        for number in range(first, self.num_images if end is None else min(end, self.num_images)):
            chosen = number % _NUM_DISTINCT
            if number % self.broken_every == self.broken_every - 1:
                chosen = _NUM_DISTINCT + number // self.broken_every % num_broken
            extension, _, kind = self.contents[chosen]
            yield SoakImage(f"{number // _PER_FOLDER:04d}/{number:08d}.{extension}", chosen, kind)

    def write_files(self, folder: Path) -> None:
        """Write the images to a local folder, as hard links to the distinct files; folders that exist are kept."""
        images, distinct = folder / "images", folder / "distinct"
        images.mkdir(parents=True, exist_ok=True)
        distinct.mkdir(exist_ok=True)
        for number, (_, content, _) in enumerate(self.contents):
            if not (distinct / str(number)).exists():
                (distinct / str(number)).write_bytes(content)
        for first in range(0, self.num_images, _PER_FOLDER):
            finished, unfinished = images / f"{first // _PER_FOLDER:04d}", folder / "unfinished"
            if finished.exists():
                continue
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for image in self.iterate(first, first + _PER_FOLDER):
                _link(distinct / str(image.number), unfinished / Path(image.key).name)
            unfinished.rename(finished)

    def upload(self, client: Any, bucket: str) -> None:
        """Upload the images that a bucket does not have yet, below `images/`, with a boto3 client."""
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="images/")
        present = {item["Key"] for page in pages for item in page.get("Contents", ())}

        def put(image: SoakImage) -> None:
            client.put_object(Bucket=bucket, Key=f"images/{image.key}", Body=self.contents[image.number][1])

        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(put, (image for image in self.iterate() if f"images/{image.key}" not in present)):
                pass


def _encode_distinct(count: int) -> list[tuple[str, bytes, str | None]]:
    rng = np.random.default_rng(0)
    files: list[tuple[str, bytes, str | None]] = []
    for number in range(count):
        file_format, mode, extension = _FORMATS[number % len(_FORMATS)]
        pixels = rng.integers(0, 256, (*rng.integers(1, _MAX_SIDE_PX + 1, 2), 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, file_format)
        files.append((extension, buffer.getvalue(), None))
    return files


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # A file system without hard links, or with few per file.
        shutil.copyfile(source, target)
