"""The plan of a run: its frozen listing, which assigns each image to a fragment.

A fragment is the unit of work, retry, resume and commit. The plan is written before any image is read; from then on a
fragment is identified by its number alone. Plans are processed as streams, so memory does not grow with the number of
images: a plan is first spooled to the driver's disk, and copied to the output folder once it is complete and known to
belong to the run.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.schema import PLAN_SCHEMA
from segray.storage import join_uri, list_names, read_columns, remove_file, write_bytes

_PLAN_NAME = re.compile(r"plan-[0-9a-f]{16}-\d{5,}\.parquet")
FRAGMENT_NAME = re.compile(r"part-(\d{8,})\.parquet")
_FRAGMENTS_PER_FILE = 1024  # 65,536 images at the default fragment size; a file of that size is read in milliseconds.


class ListedImage(NamedTuple):
    """An input image of a run.

    Attributes:
        size_bytes: Size of the encoded file. None if neither a listing nor a manifest gives it.
        etag: Entity tag that the file must have when it is read; None accepts any content.
        mask_uri: Its ground truth, or None.
        mask_etag: Entity tag of the mask, used as ``etag`` is.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    mask_uri: str | None = None
    mask_etag: str | None = None


@dataclass(frozen=True)
class Plan:
    """Hashes and counts of a plan, without its images.

    Attributes:
        sha256: Hash of the images in order; independent of their fragments and of how the plan is stored.
        cut_sha256: Hash of the images and their fragments. It is part of the plan's file names, so that two plans never
            share a file.
    """

    sha256: str
    cut_sha256: str
    num_images: int
    num_fragments: int

    @property
    def num_files(self) -> int:
        """Number of Parquet files that the plan is stored in."""
        return -(-self.num_fragments // _FRAGMENTS_PER_FILE)


def cut_fragments(images: Iterable[ListedImage], settings: SegmentSettings) -> Iterator[tuple[ListedImage, int]]:
    """Yield each image with the number of its fragment.

    A fragment has at most ``fragment_size`` images and ``fragment_bytes`` bytes of encoded images; an image larger than
    that has a fragment of its own.
    """
    fragment, num_images, num_bytes = 0, 0, 0
    for image in images:
        size_bytes = image.size_bytes or 0
        if num_images and (num_images == settings.fragment_size or num_bytes + size_bytes > settings.fragment_bytes):
            fragment, num_images, num_bytes = fragment + 1, 0, 0
        yield image, fragment
        num_images, num_bytes = num_images + 1, num_bytes + size_bytes


def spool_plan(planned: Iterable[tuple[ListedImage, int]], folder: Path) -> Plan:
    """Write a plan to a local folder and return its hashes and counts; one file of it is in memory at a time."""
    digest, cut_digest = hashlib.sha256(), hashlib.sha256()
    rows: list[tuple[Any, ...]] = []
    num_images, number, fragment = 0, 0, -1
    for image, fragment in planned:
        if fragment // _FRAGMENTS_PER_FILE != number:
            _write_plan_file(rows, folder / str(number))
            rows, number = [], number + 1
        rows.append((*image, fragment))
        digest.update(json.dumps(image).encode())
        cut_digest.update(json.dumps([image.uri, fragment]).encode())
        num_images += 1
    if rows:
        _write_plan_file(rows, folder / str(number))
    sha256 = digest.hexdigest()
    cut_digest.update(sha256.encode())
    return Plan(sha256, cut_digest.hexdigest(), num_images, fragment + 1)


def _write_plan_file(rows: list[tuple[Any, ...]], path: Path) -> None:
    names = [*ListedImage._fields, "fragment"]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    table = pa.table([pa.array(columns[field.name], field.type) for field in PLAN_SCHEMA], schema=PLAN_SCHEMA)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def save_plan(output_uri: str, plan: Plan, folder: Path) -> None:
    """Copy a spooled plan to ``plan/*.parquet``; existing files are not written again.

    File names contain ``cut_sha256``, so a concurrent driver that plans another listing overwrites none of them.
    """
    names = list_names(join_uri(output_uri, "plan"))
    for number in range(plan.num_files):
        if _get_file_name(plan.cut_sha256, number) not in names:
            write_bytes(_get_plan_uri(output_uri, plan.cut_sha256, number), (folder / str(number)).read_bytes())


def remove_other_plans(output_uri: str, plan: Plan) -> None:
    """Remove the files of other plans, which a driver that was interrupted or refused may have left."""
    kept = {_get_file_name(plan.cut_sha256, number) for number in range(plan.num_files)}
    for name in list_names(join_uri(output_uri, "plan")) - kept:
        if _PLAN_NAME.fullmatch(name):
            remove_file(join_uri(output_uri, "plan", name))


def iterate_spooled(folder: Path, plan: Plan) -> Iterator[tuple[ListedImage, int]]:
    """Yield the images of a spooled plan with their fragments."""
    return _iterate(pq.read_table(folder / str(number)) for number in range(plan.num_files))


def iterate_plan(output_uri: str, plan: Plan) -> Iterator[tuple[ListedImage, int]]:
    """Yield the images of a saved plan with their fragments."""
    uris = (_get_plan_uri(output_uri, plan.cut_sha256, number) for number in range(plan.num_files))
    return _iterate(read_columns(uri) for uri in uris)


def _iterate(tables: Iterable[pa.Table]) -> Iterator[tuple[ListedImage, int]]:
    for table in tables:
        for batch in table.select([*ListedImage._fields, "fragment"]).to_batches(max_chunksize=10_000):
            for *image, fragment in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield ListedImage(*image), fragment


def count_images(output_uri: str, plan: Plan) -> npt.NDArray[np.int64]:
    """Return the number of images of each fragment of a saved plan."""
    counts = np.zeros(plan.num_fragments, np.int64)
    for number in range(plan.num_files):
        table = read_columns(_get_plan_uri(output_uri, plan.cut_sha256, number), ["fragment"])
        counts += np.bincount(table["fragment"].to_numpy(), minlength=plan.num_fragments)
    return counts


def load_fragment(output_uri: str, cut_sha256: str, fragment: int) -> pa.Table:
    """Return the planned images of one fragment as a table of ``PLAN_SCHEMA``."""
    part = _load_plan_file(_get_plan_uri(output_uri, cut_sha256, fragment // _FRAGMENTS_PER_FILE))
    return part.filter(pc.equal(part["fragment"], fragment))


@lru_cache(maxsize=2)  # Successive fragments of a decode process are nearly always in the same file.
def _load_plan_file(uri: str) -> pa.Table:
    return read_columns(uri)


def list_finished_fragments(output_uri: str) -> set[int]:
    """Return the numbers of the fragments whose file exists; files are written atomically, so these are complete."""
    names = list_names(join_uri(output_uri, "images"))
    return {int(match[1]) for name in names if (match := FRAGMENT_NAME.fullmatch(name))}


def get_fragment_uri(output_uri: str, fragment: int) -> str:
    """Return the URI of the file with a fragment's rows."""
    return join_uri(output_uri, "images", f"part-{fragment:08d}.parquet")


def _get_plan_uri(output_uri: str, cut_sha256: str, number: int) -> str:
    return join_uri(output_uri, "plan", _get_file_name(cut_sha256, number))


def _get_file_name(cut_sha256: str, number: int) -> str:
    return f"plan-{cut_sha256[:16]}-{number:05d}.parquet"
