"""Limits on the share of error rows: one stops a run early, the other is applied to a complete run."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from segray.config import SegmentSettings
from segray.errors import StoppedByErrorRows, TooManyErrorRows
from segray.segmentation.job import SegmentResult

_MIN_ROWS = 1000  # A smaller number of rows, such as those of one folder, says too little about all of them.


class ErrorRowMonitor:
    """Counts the rows that a call writes.

    Args:
        settings: ``stop_error_fraction`` is used.

    Attributes:
        num_rows: Number of rows.
        errors: Number of error rows by kind.
    """

    def __init__(self, settings: SegmentSettings) -> None:
        self._limit = settings.stop_error_fraction
        self.num_rows = 0
        self.errors: Counter[str] = Counter()

    def add(self, written: Mapping[str, Any]) -> int:
        """Count the rows of a fragment, and return their number.

        Args:
            written: The columns ``num_ok`` and ``errors`` of ``COUNTS_SCHEMA``.
        """
        errors = {error["kind"]: error["count"] for error in written["errors"]}
        num_rows: int = written["num_ok"] + sum(errors.values())
        self.errors.update(errors)
        self.num_rows += num_rows
        return num_rows

    @property
    def is_exceeded(self) -> bool:
        """Whether there are at least 1,000 rows, and the share of error rows is above ``stop_error_fraction``."""
        return self.num_rows >= _MIN_ROWS and self.errors.total() > self._limit * self.num_rows

    def build_error(self) -> StoppedByErrorRows:
        """Return the error that ends the run if the limit is exceeded."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.errors.most_common())
        return StoppedByErrorRows(
            f"stopped because {self.errors.total()} of the first {self.num_rows} images are error rows ({kinds}), the "
            f"limit is {self._limit:.1%} (segment.stop_error_fraction); the rows written so far are kept. Check the "
            "images and the bundle; to resume nevertheless, rerun with --set segment.stop_error_fraction=1"
        )


def require_few_errors(outcome: SegmentResult, settings: SegmentSettings) -> None:
    """Raise if a complete run has too many error rows; all of its rows are written nevertheless.

    Raises:
        TooManyErrorRows: The share of error rows is at least ``max_error_fraction``.
    """
    num_errors = sum(outcome.errors.values())
    num_images = outcome.num_ok + num_errors
    if num_errors and num_errors >= settings.max_error_fraction * num_images:
        raise TooManyErrorRows(
            f"{num_errors} of {num_images} images are error rows ({num_errors / num_images:.1%}), the limit is "
            f"{settings.max_error_fraction:.1%} (segment.max_error_fraction); all rows are written. Fix the images and "
            "rerun with --set segment.retry_errors=true, or raise the limit"
        )
