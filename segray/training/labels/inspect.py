"""Label check: open every image and mask before the first training step, and list every fault with its remedy.

Without this check, an undeclared class value fails an assertion on the GPU, which kills the process without naming the
file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from segray.data.classes import ClassMap
from segray.data.image_files import swaps_sides
from segray.data.sample_list import Sample, SampleList
from segray.data.samples import describe_size_fault, read_image, read_mask
from segray.errors import ImageFault
from segray.runtime.failures import named_failure, translated_ray_errors
from segray.storage import read_bytes
from segray.training.labels.heuristics import NO_DIGEST, compute_pixel_digest, is_mixed
from segray.training.labels.near_duplicates import NO_THUMBPRINT, compute_thumbprint
from segray.training.labels.split_report import LabelFault, SplitReport, WarningKind
from segray.training.sampling import count_presence_bytes, pack_presence

# Images per task. With more images it is larger, so that the driver is not kept busy by the number of tasks.
_MIN_CHUNK_SIZE, _MAX_CHUNK_SIZE = 32, 1024
_MIN_CHUNKS_PER_CPU = 16

_MIXED = "looks resized with interpolation or saved as JPEG"
_MIXED_REMEDY = "resize masks with nearest neighbour, and save them as PNG"
_TURN_REMEDY = "rotate the mask to match the image as viewers show it, or save the image without EXIF"


def check_samples(samples: Sequence[Sample], classes: ClassMap) -> SplitReport:
    """Open the given images and masks and count labelled pixels; a mask is checked even if its image is bad.

    Raises:
        StorageError: Permissions, network or disk error; a missing file is a fault in the report instead.
        ClusterError: An unexpected exception was raised.
    """
    report = SplitReport.empty(classes.num_classes)
    for sample in samples:
        with named_failure(f"the label check of {sample.image_uri} and its mask"):
            report += _check_sample(sample, classes)
    return report


def _check_sample(sample: Sample, classes: ClassMap) -> SplitReport:
    report = SplitReport.empty(classes.num_classes)
    report = replace(report, num_samples=1, digests=NO_DIGEST, thumbprints=NO_THUMBPRINT)
    size = None
    try:
        image = read_image(sample.image_uri)
        size = image.shape[:2]
        report = replace(report, digests=compute_pixel_digest(image), thumbprints=compute_thumbprint(image))
    except ImageFault as fault:
        remedy = fault.remedy or "replace the file, or remove it"
        report.faults.append(LabelFault(sample.image_uri, fault.kind, fault.message, remedy))
    try:
        raw = read_mask(sample.mask_uri)
    except ImageFault as fault:
        remedy = fault.remedy or "replace the mask, or remove its image"
        report.faults.append(LabelFault(sample.mask_uri, fault.kind, fault.message, remedy))
        return replace(report, presence=bytes(count_presence_bytes(classes.num_classes)))
    return report + _check_mask(sample, raw, size, classes)


def _check_mask(
    sample: Sample, raw: npt.NDArray[np.integer], size: tuple[int, ...] | None, classes: ClassMap
) -> SplitReport:
    """Return the part of a sample's report that concerns its mask; pixels are counted if there is no fault."""
    report = SplitReport.empty(classes.num_classes)
    mixed = is_mixed(raw)
    truth = None
    try:
        truth = classes.encode(raw)
    except ImageFault as fault:
        message, remedy = (f"{fault.message}; {_MIXED}", _MIXED_REMEDY) if mixed else (fault.message, "")
        report.faults.append(LabelFault(sample.mask_uri, fault.kind, message, remedy))
    if size is not None and raw.shape != size:
        report.faults.append(_explain_size(sample, raw, size))
    if truth is not None and mixed:
        report.warnings.append(LabelFault(sample.mask_uri, WarningKind.INTERPOLATED, _MIXED, _MIXED_REMEDY))
    if truth is not None and not report.faults:
        report += _count_pixels(sample.mask_uri, truth, classes)
    values = [] if mixed else np.flatnonzero(np.bincount(raw.ravel())).tolist()
    presence = report.presence or bytes(count_presence_bytes(classes.num_classes))
    return replace(report, values=frozenset(values), presence=presence)


def _explain_size(sample: Sample, raw: npt.NDArray[np.integer], size: tuple[int, ...]) -> LabelFault:
    """Return the fault of a mask whose size differs from its image's; the message says if EXIF rotates the image."""
    fault = describe_size_fault(raw.shape, size)
    if raw.shape == size[::-1] and swaps_sides(read_bytes(sample.image_uri)):
        return LabelFault(
            sample.mask_uri, fault.kind, f"{fault.message}, which is rotated by its EXIF orientation", _TURN_REMEDY
        )
    return LabelFault(sample.mask_uri, fault.kind, fault.message, fault.remedy)


def _count_pixels(mask_uri: str, truth: npt.NDArray[np.integer], classes: ClassMap) -> SplitReport:
    """Return the part of a sample's report that counts pixels of each class; warn if every pixel is ignored."""
    report = SplitReport.empty(classes.num_classes)
    values = np.bincount(truth.ravel(), minlength=classes.ignore_index + 1).astype(np.int64)
    pixel_count = values[: classes.num_classes]
    is_present = (pixel_count > 0).astype(np.int64)
    if not is_present.any():
        message = "every pixel is ignored, so it adds nothing to training or scores"
        report.warnings.append(LabelFault(mask_uri, WarningKind.ALL_IGNORED, message, "label it, or remove its image"))
    return replace(
        report,
        pixel_count=pixel_count,
        image_count=is_present,
        image_px=is_present * pixel_count.sum(),
        ignored_px=int(values[classes.ignore_index]),
        presence=pack_presence(pixel_count > 0),
    )


class ReportBuilder:
    """Adds up the reports of chunks of a split, in any order, in time that is linear in the number of images.

    Args:
        num_samples: Number of samples of the split.
        num_classes: Number of classes.
        with_presence: Whether to keep which classes each image contains.
    """

    def __init__(self, num_samples: int, num_classes: int, with_presence: bool = False) -> None:
        self._widths = {"digests": len(NO_DIGEST), "thumbprints": len(NO_THUMBPRINT)}
        if with_presence:
            self._widths["presence"] = count_presence_bytes(num_classes)
        self._bytes = {name: bytearray(width * num_samples) for name, width in self._widths.items()}
        self._findings: dict[int, tuple[list[LabelFault], list[LabelFault]]] = {}
        self._counts = SplitReport.empty(num_classes)
        self.num_samples = 0
        self.num_faults = 0

    def add(self, start: int, report: SplitReport) -> None:
        """Add the report of the samples from index ``start`` on."""
        for name, width in self._widths.items():
            values = getattr(report, name)
            self._bytes[name][width * start : width * start + len(values)] = values
        if report.faults or report.warnings:
            self._findings[start] = (report.faults, report.warnings)
        self._counts += report.counts
        self.num_samples += report.num_samples
        self.num_faults += len(report.faults)

    def build(self) -> SplitReport:
        """Return the report of all samples."""
        found = [self._findings[start] for start in sorted(self._findings)]
        faults, warnings = ([fault for pair in found for fault in pair[side]] for side in (0, 1))
        return replace(
            self._counts,
            faults=faults,
            warnings=warnings,
            digests=bytes(self._bytes["digests"]),
            thumbprints=bytes(self._bytes["thumbprints"]),
            presence=bytes(self._bytes.get("presence", b"")),
        )


def check_dataset(
    samples: Sequence[Sample],
    classes: ClassMap,
    progress: Callable[[ReportBuilder], None],
    with_presence: bool = False,
) -> SplitReport:
    """Check samples on all CPUs of the cluster; ``progress`` is called after each chunk."""
    check = ray.remote(num_cpus=1, max_retries=3)(_check_range)
    # Each task gets the whole list, of which Ray keeps one copy per node, and a range.
    samples_ref, classes_ref = ray.put(SampleList.of(samples)), ray.put(classes)
    builder = ReportBuilder(len(samples), classes.num_classes, with_presence)
    running: dict[Any, int] = {}
    chunk_size = compute_chunk_size(len(samples), _count_cpus())
    for start in range(0, len(samples), chunk_size):
        running[check.remote(samples_ref, range(start, start + chunk_size), classes_ref)] = start
        # At most one task per CPU: for waiting tasks an autoscaler would add nodes that training may not need.
        while len(running) >= _count_cpus():
            _collect(running, builder)
            progress(builder)
    while running:
        _collect(running, builder)
        progress(builder)
    return builder.build()


def _check_range(samples: SampleList, numbers: range, classes: ClassMap) -> SplitReport:
    return check_samples(samples[numbers.start : numbers.stop], classes)


def compute_chunk_size(num_samples: int, num_cpus: int) -> int:
    """Return how many samples a task checks: with ten million, as many as keep the driver from being the bottleneck."""
    return min(max(num_samples // (num_cpus * _MIN_CHUNKS_PER_CPU), _MIN_CHUNK_SIZE), _MAX_CHUNK_SIZE)


def _count_cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def _collect(running: dict[Any, int], builder: ReportBuilder) -> None:
    """Wait for the next task that ends, and add its report."""
    with translated_ray_errors("the label check"):
        (done,), _ = ray.wait(list(running), num_returns=1)
        builder.add(running.pop(done), ray.get(done))


def suggest_declarations(reports: Mapping[str, SplitReport], classes: ClassMap) -> dict[str, SplitReport]:
    """Return the reports with the remedy for undeclared values, which depends on the values of all masks."""
    values = frozenset[int]().union(*(report.values for report in reports.values()))
    remedy = classes.suggest_declaration(values)

    def complete(fault: LabelFault) -> LabelFault:
        return fault if fault.remedy else replace(fault, remedy=remedy)

    return {name: replace(report, faults=list(map(complete, report.faults))) for name, report in reports.items()}
