"""A trial (``--limit``): only the first images of a plan are processed; a later call processes the others."""

from dataclasses import replace

import numpy as np

from segray.data.classes import ClassMap
from segray.results.counts import tally_counts
from segray.results.saved_counts import load_counts
from segray.results.summary import build_summary
from segray.runs.plan import count_images
from segray.runs.written import list_written_fragments
from segray.segmentation.job import SegmentJob, SegmentResult
from segray.segmentation.planning.binding import BoundRun


def count_trial_fragments(job: SegmentJob, run: BoundRun) -> int | None:
    """Return the number of fragments at the start of the plan that hold ``job.limit`` images.

    None if this call is not a trial: there is no limit, or no other fragment is pending.
    """
    if job.limit is None or not run.pending:
        return None
    totals = np.cumsum(count_images(job.output_uri, run.plan))
    num_fragments = int(np.searchsorted(totals, job.limit)) + 1
    return num_fragments if run.pending[-1] >= num_fragments else None


def restrict_run(run: BoundRun, num_fragments: int) -> BoundRun:
    """Return the run with only its first fragments pending."""
    pending = [fragment for fragment in run.pending if fragment < num_fragments]
    return replace(run, pending=pending, replaced=run.replaced & set(pending))


def summarize_trial(output_uri: str, run: BoundRun, num_fragments: int, classes: ClassMap) -> SegmentResult:
    """Return the result of the first fragments, which are all written; nothing is saved.

    Raises:
        StorageError: A fragment is damaged, or the store refused the request or failed.
    """
    written = list_written_fragments(output_uri, num_fragments)
    tally = tally_counts(load_counts(output_uri, written, classes.num_classes), classes.num_classes)
    errors = dict(sorted(tally.errors.items()))
    return SegmentResult(output_uri, tally.num_ok, errors, build_summary(tally, classes), run.plan.num_images)
