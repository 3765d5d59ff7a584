"""Compares the frozen listing of a run with the present one."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from segray.runs.listing import LISTING_SCHEMA
from segray.segmentation.planning.sorting import SortedStream


class Change(StrEnum):
    """How an image differs between the two listings."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"  # the image or its mask


@dataclass
class Changes:
    """Number of changes of each kind, and a description of the first one."""

    counts: Counter[Change] = field(default_factory=Counter)
    first: str | None = None

    def add(self, uris_by_change: dict[Change, pa.Array]) -> None:
        """Count changes of images that come after those of earlier calls; each array is sorted."""
        found = {change: uris for change, uris in uris_by_change.items() if len(uris)}
        for change, uris in found.items():
            self.counts[change] += len(uris)
        if found and self.first is None:
            uri, change = min((uris[0].as_py(), change) for change, uris in found.items())
            self.first = f"{uri} was {change}"

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[change]} {change}" for change in Change if self.counts[change])
        return f"different listing: {counts}; {self.first}"


def merge_listings(
    frozen: Iterable[pa.RecordBatch], present: Iterable[pa.RecordBatch], retryable: Collection[str], changes: Changes
) -> Iterator[pa.RecordBatch]:
    """Yield the images of the frozen plan in their present state, and collect the changes that are not allowed.

    Args:
        frozen: The plan of the run, sorted by URI: batches of ``PLAN_SCHEMA``.
        present: The present listing, sorted by URI: batches of ``LISTING_SCHEMA``.
        retryable: URIs of images that may change because they are error rows. If one was removed, it stays in the plan.
        changes: Receives every change of other images.

    Yields:
        Batches of ``LISTING_SCHEMA`` with the column ``fragment`` of the plan.
    """
    allowed = pa.array(sorted(retryable), pa.large_string())
    planned_schema = LISTING_SCHEMA.append(pa.field("fragment", pa.int64()))
    planned = SortedStream(batch.cast(planned_schema) for batch in frozen)
    listed = SortedStream(iter(present))
    while lasts := [stream.last for stream in (planned, listed) if stream.last is not None]:
        bound = min(lasts)
        then = pa.concat_batches([_build_empty(planned_schema), *planned.take_until(bound)])
        now = pa.concat_batches([_build_empty(LISTING_SCHEMA), *listed.take_until(bound)])
        merged = _take_present(then, now)
        is_removed = pc.invert(pc.is_in(then["uri"], value_set=now["uri"]))
        is_refused = pc.invert(pc.is_in(then["uri"], value_set=allowed))
        is_changed = pa.array(_find_different(then, merged))
        changes.add(
            {
                Change.ADDED: now["uri"].filter(pc.invert(pc.is_in(now["uri"], value_set=then["uri"]))),
                Change.REMOVED: then["uri"].filter(pc.and_(is_removed, is_refused)),
                Change.CHANGED: then["uri"].filter(pc.and_(is_changed, is_refused)),
            }
        )
        if merged.num_rows:
            yield merged


def _build_empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array([], field.type) for field in schema], schema=schema)


def _take_present(then: pa.RecordBatch, now: pa.RecordBatch) -> pa.RecordBatch:
    """Return the planned images, those that are still listed as they are now."""
    positions = pc.index_in(then["uri"], value_set=now["uri"])
    is_listed = positions.is_valid()
    columns = [pc.if_else(is_listed, now[name].take(positions), then[name]) for name in LISTING_SCHEMA.names]
    return pa.record_batch([*columns, then["fragment"]], schema=then.schema)


def _find_different(then: pa.RecordBatch, merged: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which rows differ in any column; null equals null."""
    is_different = np.zeros(then.num_rows, bool)
    for name in LISTING_SCHEMA.names:
        is_equal = pc.equal(then[name], merged[name])
        both_null = pc.and_(pc.is_null(then[name]), pc.is_null(merged[name]))
        is_different |= ~pc.or_(is_equal.fill_null(False), both_null).to_numpy(zero_copy_only=False)
    return is_different
