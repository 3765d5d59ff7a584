"""The record of a label check without faults, in the output folder, so that a resumed run does not check again."""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import ClassVar, Self

import numpy as np

from segray.data.classes import ClassMap
from segray.errors import RunMismatchError
from segray.runs.fingerprint import Record, read_record
from segray.storage import join_uri, remove_file, write_bytes
from segray.training.labels.split_report import SplitReport
from segray.training.sampling import count_presence_bytes

_RECORD_NAME = "labels.json"
_FORMAT_VERSION = 1  # Raise it if the check finds more, so that labels of earlier records are checked again.


class SplitCounts(Record):
    """What a label check counted in one split; see ``SplitReport``.

    ``presence`` is compressed with zlib, and text in base64; it is empty if it was not collected.
    """

    num_samples: int
    num_warnings: int
    pixel_count: list[int]
    image_count: list[int]
    image_px: list[int]
    ignored_px: int
    presence: str

    @classmethod
    def of(cls, report: SplitReport) -> Self:
        """Return the counts of a report."""
        return cls(
            num_samples=report.num_samples,
            num_warnings=len(report.warnings),
            pixel_count=report.pixel_count.tolist(),
            image_count=report.image_count.tolist(),
            image_px=report.image_px.tolist(),
            ignored_px=report.ignored_px,
            presence=b64encode(zlib.compress(report.presence)).decode("ascii"),
        )

    def build_report(self) -> SplitReport:
        """Return a report with these counts, without the warnings and the digests."""
        return replace(
            SplitReport.empty(len(self.pixel_count)),
            num_samples=self.num_samples,
            pixel_count=np.array(self.pixel_count, np.int64),
            image_count=np.array(self.image_count, np.int64),
            image_px=np.array(self.image_px, np.int64),
            ignored_px=self.ignored_px,
            presence=zlib.decompress(b64decode(self.presence)),
        )


class LabelRecord(Record):
    """Content of ``labels.json``: a label check that found no faults.

    Attributes:
        format_version: Version of the file and of the check.
        listing: sha256 of the list of images, their masks and splits, and of their version if it is known.
        class_values: Raw mask value of each class.
        ignore_values: Raw mask values of ignored pixels.
        checked_at: When the check ended, in UTC.
        splits: Counts by split name.
    """

    newest_format: ClassVar[int] = _FORMAT_VERSION

    format_version: int
    listing: str
    class_values: list[int]
    ignore_values: list[int]
    checked_at: str
    splits: dict[str, SplitCounts]

    @classmethod
    def of(cls, reports: Mapping[str, SplitReport], listing: str, classes: ClassMap) -> Self:
        """Return the record of a check that has just ended; ``reports`` are by split name."""
        return cls(
            format_version=_FORMAT_VERSION,
            listing=listing,
            class_values=list(classes.values),
            ignore_values=list(classes.ignore_values),
            checked_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            splits={name: SplitCounts.of(report) for name, report in reports.items()},
        )

    def write(self, output: str) -> None:
        """Write the record into an output folder.

        Raises:
            StorageError: Permissions, network or disk error.
        """
        write_bytes(join_uri(output, _RECORD_NAME), json.dumps(self.model_dump()).encode())

    def __str__(self) -> str:
        num_samples = sum(split.num_samples for split in self.splits.values())
        num_warnings = sum(split.num_warnings for split in self.splits.values())
        return (
            f"labels were checked on {self.checked_at}: {num_samples:,} images and masks, no faults, {num_warnings:,} "
            "warnings; to check them again, set train.recheck_labels: true"
        )


def find_record(output: str, listing: str, classes: ClassMap, with_presence: bool = False) -> LabelRecord | None:
    """Return the record in an output folder, if it is one of the same images, masks, splits and class values.

    Args:
        output: URI of the folder.
        listing: sha256 of the list of images, their masks and splits, and of their version if it is known.
        classes: The classes that the masks are read with.
        with_presence: Whether the record must say which classes each image contains.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    expected = (_FORMAT_VERSION, listing, list(classes.values), list(classes.ignore_values))
    # A damaged record, or one of a newer version: the labels are checked again.
    with suppress(RunMismatchError, ValueError, zlib.error):
        record = read_record(join_uri(output, _RECORD_NAME), LabelRecord)
        if record is None:
            return None
        if (record.format_version, record.listing, record.class_values, record.ignore_values) != expected:
            return None
        if all(_is_complete(split, classes.num_classes, with_presence) for split in record.splits.values()):
            return record
    return None


def _is_complete(counts: SplitCounts, num_classes: int, with_presence: bool) -> bool:
    report = counts.build_report()
    num_bytes = report.num_samples * count_presence_bytes(num_classes)
    return len(report.presence) == num_bytes or (not with_presence and not report.presence)


def remove_record(output: str) -> None:
    """Remove the record from an output folder, because the labels have faults now.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    remove_file(join_uri(output, _RECORD_NAME))
