"""Label check: every image and mask opened before the first step, every fault listed with what mends it.

An undeclared class value is an assertion on a GPU that kills the process without naming a file; here it is a line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from segray.classes import ClassMap
from segray.cluster import translated_ray_errors
from segray.errors import DataError, FaultKind, ImageFault
from segray.manifest import Sample
from segray.metrics import IntArray
from segray.samples import read_image, read_truth

_CHUNK_SIZE = 32
_MAX_CHUNKS_IN_FLIGHT = 64


@dataclass(frozen=True)
class LabelFault:
    """One file that training cannot use."""

    uri: str
    kind: FaultKind
    message: str

    def __str__(self) -> str:
        return f"{self.uri}: {self.kind}: {self.message}"


@dataclass(frozen=True)
class LabelReport:
    """Outcome of a label check.

    Attributes:
        num_samples: Image and mask pairs that were opened.
        faults: In the order of the samples.
        pixel_count: (C,) int64, labelled pixels of each class.
        image_count: (C,) int64, images in which each class is labelled.
        ignored_px: Pixels with an ignored value.
    """

    num_samples: int
    faults: list[LabelFault]
    pixel_count: IntArray
    image_count: IntArray
    ignored_px: int

    def __add__(self, other: "LabelReport") -> "LabelReport":
        return LabelReport(
            self.num_samples + other.num_samples,
            self.faults + other.faults,
            self.pixel_count + other.pixel_count,
            self.image_count + other.image_count,
            self.ignored_px + other.ignored_px,
        )

    @property
    def image_px(self) -> IntArray:
        return self.pixel_count  # TEMPORARY

    @classmethod
    def empty(cls, num_classes: int) -> "LabelReport":
        """Return the report of no samples."""
        zeros = np.zeros(num_classes, np.int64)
        return cls(0, [], zeros, zeros, 0)


def check_samples(samples: Sequence[Sample], classes: ClassMap) -> LabelReport:
    """Open the given images and masks, each even if the other is bad, and count what is labelled.

    Raises:
        StorageError: The store refused or failed; a file that is simply not there is a fault in the report.
    """
    report = LabelReport.empty(classes.num_classes)
    for sample in samples:
        faults, size, truth = [], None, None
        try:
            size = read_image(sample.image_uri).shape[:2]
        except ImageFault as fault:
            faults.append(LabelFault(sample.image_uri, fault.kind, f"{fault}; replace the file, or remove it"))
        try:
            truth = read_truth(sample.mask_uri, size, classes)
        except ImageFault as fault:
            faults.append(LabelFault(sample.mask_uri, fault.kind, str(fault)))
        report += LabelReport(1, faults, *_count(truth, classes))
    return report


def _count(truth: npt.NDArray[np.integer] | None, classes: ClassMap) -> tuple[IntArray, IntArray, int]:
    """Return pixels of each class, which classes there are (0 or 1), and ignored pixels."""
    values = np.bincount([] if truth is None else truth.ravel(), minlength=classes.ignore_index + 1).astype(np.int64)
    pixel_count = values[: classes.num_classes]
    return pixel_count, (pixel_count > 0).astype(np.int64), int(values[classes.ignore_index])


def check_dataset(samples: Sequence[Sample], classes: ClassMap) -> Iterator[LabelReport]:
    """Check samples on all CPUs of the cluster; yield the report so far, in sample order."""
    check = ray.remote(num_cpus=1, max_retries=3)(check_samples)
    classes_ref = ray.put(classes)
    report = LabelReport.empty(classes.num_classes)
    running: list[Any] = []
    for start in range(0, len(samples), _CHUNK_SIZE):
        running.append(check.remote(samples[start : start + _CHUNK_SIZE], classes_ref))
        if len(running) >= _MAX_CHUNKS_IN_FLIGHT:
            report += _fetch(running.pop(0))
            yield report
    for chunk in running:
        report += _fetch(chunk)
        yield report


def _fetch(chunk: Any) -> LabelReport:
    with translated_ray_errors("the label check"):
        result: LabelReport = ray.get(chunk)
        return result


def require_learnable(report: LabelReport, split: str) -> None:
    """Refuse a split with faults, or with no labelled pixel.

    Raises:
        DataError: Names the first faults, and how to see them all.
    """
    if report.faults:
        shown = "; ".join(str(fault) for fault in report.faults[:3])
        more = f"; and {len(report.faults) - 3} more" if len(report.faults) > 3 else ""
        raise DataError(f"{len(report.faults)} bad labels in {split} (segray check lists all): {shown}{more}")
    if not report.pixel_count.any():
        raise DataError(f"{split}: every pixel of its {report.num_samples} masks is ignored; see data.ignore_values")
