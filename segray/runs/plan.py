"""The frozen listing of a run: which images, in which order, in which fragment.

A fragment is the unit of work, retry, resume and commit. The plan is written before any image is read; after that a
fragment's number says everything about it. A plan passes through as a stream, however many images there are: it is
spooled to the driver's disk, and only once it is whole, and belongs to the run, to the output.
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
_FRAGMENTS_PER_FILE = 1024  # 65,536 images of the default fragment size: a file that decodes in milliseconds


class ListedImage(NamedTuple):
    """An image that a run is about.

    Attributes:
        size_bytes: None where a list names it: listed images are not looked at before they are read.
        etag: What its content has to be known by when it is read; None takes any content.
        mask_uri: Its ground truth, if there is any.
        mask_etag: As ``etag``.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    mask_uri: str | None = None
    mask_etag: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is known of a plan without reading it.

    Attributes:
        sha256: Of its images, in order; neither how they are stored nor how they are cut.
        cut_sha256: Of its images and their fragments; names its files, so that no plan is ever taken for another.
    """

    sha256: str
    cut_sha256: str
    num_images: int
    num_fragments: int

    @property
    def num_files(self) -> int:
        """Number of files that it is stored in."""
        return -(-self.num_fragments // _FRAGMENTS_PER_FILE)


def cut_fragments(images: Iterable[ListedImage], settings: SegmentSettings) -> Iterator[tuple[ListedImage, int]]:
    """Yield each image with the number of its fragment.

    ``fragment_size`` and ``fragment_bytes`` bound a fragment; an image larger than that is alone.
    """
    fragment, num_images, num_bytes = 0, 0, 0
    for image in images:
        size_bytes = image.size_bytes or 0
        if num_images and (num_images == settings.fragment_size or num_bytes + size_bytes > settings.fragment_bytes):
            fragment, num_images, num_bytes = fragment + 1, 0, 0
        yield image, fragment
        num_images, num_bytes = num_images + 1, num_bytes + size_bytes


def spool_plan(planned: Iterable[tuple[ListedImage, int]], folder: Path) -> Plan:
    """Write a plan to a folder of this machine, holding one file of it at a time."""
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
    """Write a spooled plan to ``plan/*.parquet``; files that are there are not written again.

    Their names say of which listing they are: another driver that plans another listing overwrites none of them.
    """
    names = list_names(join_uri(output_uri, "plan"))
    for number in range(plan.num_files):
        if _get_file_name(plan.cut_sha256, number) not in names:
            write_bytes(_get_plan_uri(output_uri, plan.cut_sha256, number), (folder / str(number)).read_bytes())


def remove_other_plans(output_uri: str, plan: Plan) -> None:
    """Remove what a driver that was cut off, or refused, may have left of another listing or another cut."""
    mine = {_get_file_name(plan.cut_sha256, number) for number in range(plan.num_files)}
    for name in list_names(join_uri(output_uri, "plan")) - mine:
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
    """Return the planned images of one fragment, a table of ``PLAN_SCHEMA``."""
    part = _load_plan_file(_get_plan_uri(output_uri, cut_sha256, fragment // _FRAGMENTS_PER_FILE))
    return part.filter(pc.equal(part["fragment"], fragment))


@lru_cache(maxsize=2)  # a decode task's next fragment is nearly always in the same file
def _load_plan_file(uri: str) -> pa.Table:
    return read_columns(uri)


def list_finished_fragments(output_uri: str) -> set[int]:
    """Return the numbers of the fragments whose file is there; a file that is there is complete."""
    names = list_names(join_uri(output_uri, "images"))
    return {int(match[1]) for name in names if (match := FRAGMENT_NAME.fullmatch(name))}


def get_fragment_uri(output_uri: str, fragment: int) -> str:
    """Return where a fragment's rows are stored."""
    return join_uri(output_uri, "images", f"part-{fragment:08d}.parquet")


def _get_plan_uri(output_uri: str, cut_sha256: str, number: int) -> str:
    return join_uri(output_uri, "plan", _get_file_name(cut_sha256, number))


def _get_file_name(cut_sha256: str, number: int) -> str:
    return f"plan-{cut_sha256[:16]}-{number:05d}.parquet"
