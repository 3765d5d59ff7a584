"""Leaves out the images that earlier runs have already segmented (``--exclude``), in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from segray.errors import ConfigError
from segray.results.saved_counts import load_outcomes, read_fragments
from segray.results.summary import list_fragments_with_errors
from segray.runs.plan import iterate_plan
from segray.runs.run_file import RunFile, require_run
from segray.runs.written import list_written_fragments
from segray.segmentation.planning.sorting import SortedStream, sort_by_uri


class EarlierRun(NamedTuple):
    """A run whose segmented images are left out, and its ``run.json``."""

    output_uri: str
    record: RunFile

    def describe(self, bundle_sha256: str) -> str | None:
        """Return a line on what the user may not expect of this run, or None."""
        remarks = []
        if self.record.status != "complete":
            remarks.append("is not complete, so only the images that it has segmented so far are left out")
        if self.record.fingerprint.bundle_sha256 != bundle_sha256:
            remarks.append("was made with another bundle")
        return f"warning: --exclude {self.output_uri} {', and '.join(remarks)}" if remarks else None


def open_earlier_runs(exclude_uris: Sequence[str], output_uri: str) -> list[EarlierRun]:
    """Return the runs at the given run folders.

    Args:
        exclude_uris: Run folders.
        output_uri: The folder of the new run.

    Raises:
        ConfigError: A run is to exclude itself.
        MissingFileError: There is no run in a folder.
        RunMismatchError: A ``run.json`` is not valid.
        StorageError: The store refused the request or failed.
    """
    if output_uri in exclude_uris:
        raise ConfigError(f"--exclude {output_uri} is the --output of this run; give the folder of an earlier run")
    return [EarlierRun(uri, require_run(uri)) for uri in exclude_uris]


def leave_out(batches: Iterable[pa.RecordBatch], runs: Sequence[EarlierRun]) -> Iterator[pa.RecordBatch]:
    """Yield a listing without the images that a run has as an ``ok`` row, with the same URI and entity tag.

    An image without an entity tag is never left out, because its content may have changed.

    Args:
        batches: Batches of ``LISTING_SCHEMA``, sorted by URI.
        runs: The earlier runs, complete or not.

    Raises:
        StorageError: The store refused the request or failed.
    """
    if not runs:
        yield from batches
        return
    segmented = SortedStream(sort_by_uri(chain.from_iterable(map(_iterate_segmented, runs))))
    for batch in batches:
        keys = _build_keys(batch)
        is_left_out = np.zeros(batch.num_rows, bool)
        for part in segmented.take_until(batch["uri"][-1].as_py()):
            is_left_out |= pc.is_in(keys, value_set=_build_keys(part)).to_numpy(zero_copy_only=False)
        yield batch.filter(pa.array(~is_left_out)) if is_left_out.any() else batch


def _build_keys(batch: pa.RecordBatch) -> pa.LargeStringArray:
    """Return URI and entity tag as one string; null without a tag, which ``_iterate_segmented`` never yields."""
    return pc.binary_join_element_wise(batch["uri"], batch["etag"], pa.scalar("\0", pa.large_string()))


def _iterate_segmented(run: EarlierRun) -> Iterator[pa.RecordBatch]:
    """Yield URI and entity tag of the ``ok`` rows of a run that have one, sorted by URI.

    They are the planned images of the written fragments, apart from the error rows.
    """
    written = list_written_fragments(run.output_uri, run.record.plan.num_fragments)
    is_written = np.zeros(run.record.plan.num_fragments, bool)
    is_written[list(written)] = True
    has_errors = np.zeros(run.record.plan.num_fragments, bool)
    has_errors[list_fragments_with_errors(load_outcomes(run.output_uri, written))] = True
    schema = pa.schema([("uri", pa.large_string()), ("etag", pa.large_string())])
    for batch in iterate_plan(run.output_uri, run.record.plan):
        fragments = batch["fragment"].to_numpy()
        is_ok = is_written[fragments] & batch["etag"].is_valid().to_numpy(zero_copy_only=False)
        is_ok &= ~_find_errors(run.output_uri, np.unique(fragments[has_errors[fragments]]), batch["uri"])
        yield batch.select(schema.names).cast(schema).filter(pa.array(is_ok))


def _find_errors(output_uri: str, fragments: npt.NDArray[np.int64], uris: pa.StringArray) -> npt.NDArray[np.bool_]:
    """Return which of the URIs are error rows of the given fragments."""
    is_error = np.zeros(len(uris), bool)
    for rows in read_fragments(output_uri, fragments.tolist(), ["uri", "error_kind"]):
        failed = rows.filter(pc.is_valid(rows["error_kind"]))["uri"].combine_chunks()
        is_error |= pc.is_in(uris, value_set=failed).to_numpy(zero_copy_only=False)
    return is_error
