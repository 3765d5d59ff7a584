"""Cache decoded samples in memory and then on disk, as reading them back is faster than decoding them again."""

import math
import os
from dataclasses import dataclass
from tempfile import TemporaryFile, gettempdir
from threading import Lock
from typing import IO

import numpy as np
import numpy.typing as npt

from segray.data.classes import ClassMap
from segray.data.sample_list import Sample
from segray.data.samples import read_image, read_truth
from segray.errors import DataError, ImageFault, StorageError, flatten_message
from segray.runtime.failures import named_failure

LabelledImage = tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]


def load_labelled_image(sample: Sample, classes: ClassMap) -> LabelledImage:
    """Read an image (H, W, 3) uint8 and its class-index map (H, W), at the original size.

    Raises:
        DataError: The image or mask cannot be used, or their sizes differ.
        StorageError: Permissions, network or disk error.
        ClusterError: An unexpected exception was raised.
    """
    uri = sample.image_uri
    try:
        with named_failure(f"reading {sample.image_uri} and its mask"):
            image = read_image(uri)
            uri = sample.mask_uri
            return image, read_truth(uri, image.shape[:2], classes)
    except ImageFault as fault:
        raise DataError(f"{uri}: {fault.kind}: {fault}; run segray check to list all such files") from fault


class SampleStore:
    """A thread-safe cache of decoded samples, limited in memory and disk.

    Samples are never evicted: each epoch reads every sample once, so evicting the oldest would remove each sample just
    before it is needed again.

    Args:
        classes: Classes that the mask values stand for.
        max_bytes: Memory for decoded samples.
        max_disk_bytes: Disk for samples that do not fit into memory, in the folder named by ``TMPDIR``.
    """

    def __init__(self, classes: ClassMap, max_bytes: int, max_disk_bytes: int = 0) -> None:
        self._classes = classes
        self._free_bytes = max_bytes
        self._kept: dict[Sample, LabelledImage] = {}
        self._disk = _DiskStore(max_disk_bytes)
        self._lock = Lock()

    def load(self, sample: Sample) -> LabelledImage:
        """Return an image and its class-index map, as ``load_labelled_image`` does. Callers must not modify them."""
        found = self._kept.get(sample) or self._disk.read(sample)
        if found is None:
            found = load_labelled_image(sample, self._classes)
            num_bytes = sum(part.nbytes for part in found)
            with self._lock:
                if num_bytes <= self._free_bytes and sample not in self._kept:
                    self._free_bytes -= num_bytes
                    self._kept[sample] = found
            if sample not in self._kept:
                self._disk.write(sample, found)
        return found


@dataclass(frozen=True)
class _Location:
    """Location of a sample in the file: the bytes of the image, followed by those of the class-index map."""

    offset: int
    image_shape: tuple[int, ...]
    truth_shape: tuple[int, ...]
    truth_dtype: np.dtype[np.integer]


class _DiskStore:
    """Samples in an unnamed file, which the system deletes when the process ends, even if it is killed."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._end = 0
        self._claimed: set[Sample] = set()
        self._locations: dict[Sample, _Location] = {}
        self._file = _open_unnamed_file() if max_bytes else None
        self._lock = Lock()

    def write(self, sample: Sample, found: LabelledImage) -> None:
        """Write a sample if it fits within the limit and no other thread has written it."""
        image, truth = found
        num_bytes = image.nbytes + truth.nbytes
        with self._lock:
            if self._file is None or sample in self._claimed or num_bytes > self._free_bytes:
                return
            self._claimed.add(sample)
            self._free_bytes -= num_bytes
            offset, self._end = self._end, self._end + num_bytes
        try:
            num_written = os.pwrite(self._file.fileno(), image.tobytes() + truth.tobytes(), offset)
        except OSError:  # The disk is full: samples already written stay, all others are decoded again.
            num_written = 0
        if num_written == num_bytes:
            self._locations[sample] = _Location(offset, image.shape, truth.shape, truth.dtype)
        else:
            self._free_bytes = 0

    def read(self, sample: Sample) -> LabelledImage | None:
        """Return a sample, or None if it was not written."""
        location = self._locations.get(sample)
        if location is None or self._file is None:
            return None
        num_image_bytes = math.prod(location.image_shape)
        num_bytes = num_image_bytes + math.prod(location.truth_shape) * location.truth_dtype.itemsize
        try:
            content = os.pread(self._file.fileno(), num_bytes, location.offset)
        except OSError:  # A disk error: the sample is decoded from its source again.
            content = b""
        if len(content) < num_bytes:
            return None
        image = np.frombuffer(content, np.uint8, num_image_bytes).reshape(location.image_shape)
        truth = np.frombuffer(content, location.truth_dtype, offset=num_image_bytes).reshape(location.truth_shape)
        return image, truth


def _open_unnamed_file() -> IO[bytes]:
    try:
        return TemporaryFile(prefix="segray-samples-")
    except OSError as error:
        raise StorageError(
            f"train.cache_disk_bytes: cannot write to {gettempdir()}: {flatten_message(error)}; set TMPDIR to "
            "another folder, or set train.cache_disk_bytes: 0"
        ) from error
