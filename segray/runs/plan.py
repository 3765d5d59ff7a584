"""The plan of a run: its frozen listing, which assigns each image to a fragment.

A fragment is the unit of work, retry, resume and commit. The plan is written before any image is read; from then on a
fragment is identified by its number alone. Plans are processed as streams of record batches, so memory does not grow
with the number of images: a plan is first spooled to the driver's disk, and copied to the output folder once it is
complete and known to belong to the run.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from segray.data.json_rows import format_rows
from segray.runs.listing import BATCH_ROWS
from segray.schema import PLAN_SCHEMA
from segray.storage import ParquetReader, join_uri, list_names, read_columns, remove_file, write_bytes

_PLAN_NAME = re.compile(r"plan-[0-9a-f]{16}-\d{5,}\.parquet")
FRAGMENT_NAME = re.compile(r"part-(\d{8,})\.parquet")
_FRAGMENTS_PER_FILE = 1024
_NUM_READERS = 8
_IMAGE_COLUMNS = [field.name for field in PLAN_SCHEMA if field.name != "fragment"]


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


def spool_plan(planned: Iterable[pa.RecordBatch], folder: Path) -> Plan:
    """Write a plan to a local folder and return its hashes and counts.

    Args:
        planned: The images with their fragments: the columns of ``PLAN_SCHEMA``, fragments ascending. A batch becomes a
            row group, or one row group in each of several files.
        folder: An empty folder.
    """
    digest, cut_digest = hashlib.sha256(), hashlib.sha256()
    num_images, fragment = 0, -1
    with _PlanWriter(folder) as writer:
        for batch in planned:
            digest.update(format_rows([batch[name] for name in _IMAGE_COLUMNS]))
            cut_digest.update(format_rows([batch["uri"], batch["fragment"]]))
            writer.write(batch)
            num_images += batch.num_rows
            fragment = batch["fragment"][-1].as_py()
    sha256 = digest.hexdigest()
    cut_digest.update(sha256.encode())
    return Plan(sha256, cut_digest.hexdigest(), num_images, fragment + 1)


class _PlanWriter:
    """Writes batches of a plan to the files of its fragments, one file after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = -1
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "_PlanWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        numbers = batch["fragment"].to_numpy() // _FRAGMENTS_PER_FILE
        starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in pairwise(starts):
            rows = pa.Table.from_batches([batch.slice(start, end - start)]).cast(PLAN_SCHEMA)
            self._open(int(numbers[start])).write_table(rows)

    def _open(self, number: int) -> pq.ParquetWriter:
        if number != self._number or self._writer is None:
            self.__exit__()
            self._number = number
            self._writer = pq.ParquetWriter(
                self._folder / str(number), PLAN_SCHEMA, compression="zstd", write_page_checksum=True
            )
        return self._writer


def save_plan(output_uri: str, plan: Plan, folder: Path) -> None:
    """Copy a spooled plan to ``plan/*.parquet``; existing files are not written again.

    File names contain ``cut_sha256``, so a concurrent driver that plans another listing overwrites none of them.
    """
    for number in find_lost_files(output_uri, plan):
        write_bytes(_get_plan_uri(output_uri, plan.cut_sha256, number), (folder / str(number)).read_bytes())


def find_lost_files(output_uri: str, plan: Plan) -> list[int]:
    """Return the numbers of the files of a plan that do not exist in ``plan/``."""
    names = list_names(join_uri(output_uri, "plan"))
    return [number for number in range(plan.num_files) if _get_file_name(plan.cut_sha256, number) not in names]


def remove_other_plans(output_uri: str, plan: Plan) -> None:
    """Remove the files of other plans, which a driver that was interrupted or refused may have left."""
    kept = {_get_file_name(plan.cut_sha256, number) for number in range(plan.num_files)}
    for name in list_names(join_uri(output_uri, "plan")) - kept:
        if _PLAN_NAME.fullmatch(name):
            remove_file(join_uri(output_uri, "plan", name))


def iterate_plan(output_uri: str, plan: Plan) -> Iterator[pa.RecordBatch]:
    """Yield the images of a saved plan with their fragments, as batches of ``PLAN_SCHEMA``."""
    for number in range(plan.num_files):
        reader = ParquetReader(_get_plan_uri(output_uri, plan.cut_sha256, number))
        for group in range(reader.num_row_groups):
            yield from reader.read_row_groups([group]).to_batches(max_chunksize=BATCH_ROWS)


def count_images(output_uri: str, plan: Plan) -> npt.NDArray[np.int64]:
    """Return the number of images of each fragment of a saved plan; several files are read at a time."""

    def count(number: int) -> npt.NDArray[np.int64]:
        first = number * _FRAGMENTS_PER_FILE
        table = read_columns(_get_plan_uri(output_uri, plan.cut_sha256, number), ["fragment"])
        num_fragments = min(_FRAGMENTS_PER_FILE, plan.num_fragments - first)
        return np.bincount(table["fragment"].to_numpy() - first, minlength=num_fragments)

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        counts = list(pool.map(count, range(plan.num_files)))
    return np.concatenate([np.zeros(0, np.int64), *counts])


def load_fragment(output_uri: str, cut_sha256: str, fragment: int) -> pa.Table:
    """Return the planned images of one fragment as a table of ``PLAN_SCHEMA``."""
    uri = _get_plan_uri(output_uri, cut_sha256, fragment // _FRAGMENTS_PER_FILE)
    spans = _open_plan_file(uri).get_spans("fragment")
    groups = [number for number, (first, last) in enumerate(spans) if first <= fragment <= last]
    part = pa.concat_tables([PLAN_SCHEMA.empty_table(), *(_load_row_group(uri, number) for number in groups)])
    return part.filter(pc.equal(part["fragment"], fragment))


# Successive fragments of a decode process are nearly always in the same row group, or in the next one.
@lru_cache(maxsize=2)
def _open_plan_file(uri: str) -> ParquetReader:
    return ParquetReader(uri)


@lru_cache(maxsize=2)
def _load_row_group(uri: str, number: int) -> pa.Table:
    return _open_plan_file(uri).read_row_groups([number])


def get_fragment_uri(output_uri: str, fragment: int) -> str:
    """Return the URI of the file with a fragment's rows."""
    return join_uri(output_uri, "images", f"part-{fragment:08d}.parquet")


def _get_plan_uri(output_uri: str, cut_sha256: str, number: int) -> str:
    return join_uri(output_uri, "plan", _get_file_name(cut_sha256, number))


def _get_file_name(cut_sha256: str, number: int) -> str:
    return f"plan-{cut_sha256[:16]}-{number:05d}.parquet"
