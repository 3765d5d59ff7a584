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
from segray.errors import DataError, FaultKind, ImageFault, MissingFileError
from segray.images import decode_image, decode_mask
from segray.manifest import Sample
from segray.storage import read_bytes

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
    pixel_count: npt.NDArray[np.int64]
    image_count: npt.NDArray[np.int64]
    ignored_px: int

    def __add__(self, other: "LabelReport") -> "LabelReport":
        return LabelReport(
            self.num_samples + other.num_samples,
            self.faults + other.faults,
            self.pixel_count + other.pixel_count,
            self.image_count + other.image_count,
            self.ignored_px + other.ignored_px,
        )

    @classmethod
    def empty(cls, num_classes: int) -> "LabelReport":
        """Return the report of no samples."""
        zeros = np.zeros(num_classes, np.int64)
        return cls(0, [], zeros, zeros, 0)


def check_samples(samples: Sequence[Sample], classes: ClassMap) -> LabelReport:
    """Open the given images and masks, and count what is labelled.

    Raises:
        StorageError: The store refused or failed; a file that is simply not there is a fault in the report.
    """
    report = LabelReport.empty(classes.num_classes)
    for sample in samples:
        uri = sample.image_uri
        try:
            image = decode_image(read_bytes(uri))
            uri = sample.mask_uri
            truth = classes.encode(decode_mask(read_bytes(uri)))
            if truth.shape != image.shape[:2]:
                raise ImageFault(FaultKind.MASK_MISMATCH, _describe_sizes(image, truth))
        except MissingFileError:
            kind = FaultKind.MISSING if uri == sample.image_uri else FaultKind.MASK_MISSING
            fault = LabelFault(uri, kind, "no such file; add it, or take it out of the list")
        except ImageFault as error:
            fault = LabelFault(uri, error.kind, str(error))
        else:
            report += _count(truth, classes)
            continue
        report += LabelReport(1, [fault], np.zeros_like(report.pixel_count), np.zeros_like(report.image_count), 0)
    return report


def _describe_sizes(image: npt.NDArray[np.uint8], truth: npt.NDArray[np.integer]) -> str:
    return (
        f"mask of {truth.shape[1]}x{truth.shape[0]} pixels for an image of {image.shape[1]}x{image.shape[0]}; "
        "save the mask at the image's size"
    )


def _count(truth: npt.NDArray[np.integer], classes: ClassMap) -> LabelReport:
    values = np.bincount(truth.ravel(), minlength=classes.ignore_index + 1)
    pixel_count = values[: classes.num_classes].astype(np.int64)
    return LabelReport(1, [], pixel_count, (pixel_count > 0).astype(np.int64), int(values[classes.ignore_index]))


def check_dataset(samples: Sequence[Sample], classes: ClassMap) -> Iterator[LabelReport]:
    """Check samples on all CPUs of the cluster; yield the report so far, in sample order."""
    check = ray.remote(num_cpus=1, max_retries=3)(check_samples)
    classes_ref = ray.put(classes)
    report = LabelReport.empty(classes.num_classes)
    running: list[Any] = []
    for start in range(0, len(samples), _CHUNK_SIZE):
        running.append(check.remote(samples[start : start + _CHUNK_SIZE], classes_ref))
        if len(running) >= _MAX_CHUNKS_IN_FLIGHT:
            report += ray.get(running.pop(0))
            yield report
    for chunk in running:
        report += ray.get(chunk)
        yield report


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
