"""What the label check found in a split: faults, warnings, and labelled pixels."""

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from segray.data.sample_list import Folds
from segray.errors import DataError, FaultKind
from segray.metrics import IntArray


class WarningKind(StrEnum):
    """Kinds of problems that do not prevent training but may be unintended."""

    ALL_IGNORED = "all_ignored"
    INTERPOLATED = "interpolated"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    SHARED_GROUP = "shared_group"
    NOT_COMPARED = "not_compared"


@dataclass(frozen=True)
class LabelFault:
    """A file that training cannot use, or that a warning is about.

    Attributes:
        uri: The file.
        kind: Kind of fault or warning.
        message: What is wrong with the file.
        remedy: How to fix it; the same for all files with the same problem. It is empty for undeclared values until
            ``suggest_declarations`` has seen all masks.
    """

    uri: str
    kind: FaultKind | WarningKind
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.uri}: {self.kind}: {self.message}; {self.remedy}"


@dataclass(frozen=True)
class SplitReport:
    """Result of the label check of one split.

    Attributes:
        num_samples: Pairs of image and mask that were opened.
        faults: In the order of the samples.
        warnings: In the order of the samples.
        pixel_count: (C,) int64, labelled pixels of each class.
        image_count: (C,) int64, images in which each class is labelled.
        image_px: (C,) int64, labelled pixels of any class, summed over the images that contain each class.
        ignored_px: Pixels with an ignored value.
        values: Raw values of all masks, except masks that look resized with interpolation or saved as JPEG.
        digests: 16 bytes for each image, equal for equal pixels; zeros for an image that cannot be decoded.
        thumbprints: ``THUMBPRINT.itemsize`` bytes for each image, similar for similar images.
        presence: The classes in each image, as bits (``pack_presence``); zeros for an image with a fault. Empty if it
            is not collected, because only ``train.sampling: class_balanced`` needs it.
    """

    num_samples: int
    faults: list[LabelFault]
    warnings: list[LabelFault]
    pixel_count: IntArray
    image_count: IntArray
    image_px: IntArray
    ignored_px: int
    values: frozenset[int]
    digests: bytes
    thumbprints: bytes
    presence: bytes

    def __add__(self, other: "SplitReport") -> "SplitReport":
        return SplitReport(
            self.num_samples + other.num_samples,
            self.faults + other.faults,
            self.warnings + other.warnings,
            self.pixel_count + other.pixel_count,
            self.image_count + other.image_count,
            self.image_px + other.image_px,
            self.ignored_px + other.ignored_px,
            self.values | other.values,
            self.digests + other.digests,
            self.thumbprints + other.thumbprints,
            self.presence + other.presence,
        )

    @property
    def counts(self) -> "SplitReport":
        """The report without findings and without what is stored for each image."""
        return replace(self, faults=[], warnings=[], digests=b"", thumbprints=b"", presence=b"")

    @classmethod
    def empty(cls, num_classes: int) -> "SplitReport":
        """Return a report on no samples."""
        zeros = np.zeros(num_classes, np.int64)
        return cls(0, [], [], zeros, zeros, zeros, 0, frozenset(), b"", b"", b"")


def sum_counts(reports: Iterable[SplitReport]) -> SplitReport:
    """Return the counts of all reports, of which there is at least one."""
    return functools.reduce(operator.add, (report.counts for report in reports))


def join_reports(reports: Sequence[SplitReport], folds: Folds, held_out: int | None = None) -> SplitReport:
    """Return the counts of the samples of all folds but one, and what each contains, in the order of the samples.

    Args:
        reports: Report of each fold.
        folds: The folds.
        held_out: Index of the fold that is left out, or None.
    """
    counts = sum_counts(report for number, report in enumerate(reports) if number != held_out)
    presence = np.frombuffer(b"".join(report.presence for report in reports), np.uint8)
    rows = np.argsort(folds.order, kind="stable")  # Of each sample, in the reports one after the other.
    if held_out is not None:
        rows = rows[folds.numbers != held_out]
    return replace(counts, presence=presence.reshape(len(folds.samples), -1)[rows].tobytes())


def require_learnable(report: SplitReport, split: str) -> None:
    """Raise if a split has faults or no labelled pixel.

    Raises:
        DataError: Names the first faults, and the command that lists all of them.
    """
    if report.faults:
        shown = "; ".join(str(fault) for fault in report.faults[:3])
        more = f"; and {len(report.faults) - 3} more" if len(report.faults) > 3 else ""
        raise DataError(f"{len(report.faults)} bad labels in {split} (segray check lists all): {shown}{more}")
    require_labelled(report, split)


def require_labelled(report: SplitReport, split: str) -> None:
    """Raise if a split has no labelled pixel.

    Raises:
        DataError: Names the split.
    """
    if not report.pixel_count.any():
        raise DataError(f"{split}: every pixel of its {report.num_samples} masks is ignored; see data.ignore_values")
