"""Decoded samples, kept where they can be had again sooner than by decoding: in memory, then on the node's disk."""

import math
import os
from dataclasses import dataclass
from tempfile import TemporaryFile, gettempdir
from threading import Lock
from typing import IO

import numpy as np
import numpy.typing as npt

from segray.data.classes import ClassMap
from segray.data.manifest import Sample
from segray.data.samples import read_image, read_truth
from segray.errors import DataError, ImageFault, StorageError, flatten_message

LabelledImage = tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]


def load_labelled_image(sample: Sample, classes: ClassMap) -> LabelledImage:
    """Read an image (H, W, 3) uint8 and its class-index map (H, W), both at their own size.

    Raises:
        DataError: One of them cannot be used, or their sizes differ.
        StorageError: The store refused or failed.
    """
    uri = sample.image_uri
    try:
        image = read_image(uri)
        uri = sample.mask_uri
        return image, read_truth(uri, image.shape[:2], classes)
    except ImageFault as fault:
        raise DataError(f"{uri}: {fault.kind}: {fault}; run segray check for all such files") from fault


class SampleStore:
    """Decoded samples, kept as far as memory and disk reach; threads may share it.

    What is kept stays: an epoch looks at every sample once, so that throwing out the oldest would throw out each sample
    just before it is wanted again.

    Args:
        classes: What the values in masks mean.
        max_bytes: Memory for decoded samples.
        max_disk_bytes: Disk for those beyond it, in the folder that ``TMPDIR`` names.
    """

    def __init__(self, classes: ClassMap, max_bytes: int, max_disk_bytes: int = 0) -> None:
        self._classes = classes
        self._free_bytes = max_bytes
        self._kept: dict[Sample, LabelledImage] = {}
        self._disk = _DiskStore(max_disk_bytes)
        self._lock = Lock()

    def load(self, sample: Sample) -> LabelledImage:
        """Return an image and its class-index map; see ``load_labelled_image``. Not to be written to."""
        found = self._kept.get(sample) or self._disk.read(sample)
        if found is None:
            found = load_labelled_image(sample, self._classes)
            num_bytes = sum(part.nbytes for part in found)
            with self._lock:
                if num_bytes <= self._free_bytes and sample not in self._kept:
                    self._free_bytes -= num_bytes
                    self._kept[sample] = found
            if sample not in self._kept:
                self._disk.keep(sample, found)
        return found


@dataclass(frozen=True)
class _Place:
    """Where a sample lies in the file: its image's bytes, then its truth's."""

    offset: int
    image_shape: tuple[int, ...]
    truth_shape: tuple[int, ...]
    truth_dtype: np.dtype[np.integer]


class _DiskStore:
    """Samples in a file that has no name, and so is gone with the process, however that ends."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._end = 0
        self._begun: set[Sample] = set()
        self._places: dict[Sample, _Place] = {}
        self._file = _open_nameless() if max_bytes else None
        self._lock = Lock()

    def keep(self, sample: Sample, found: LabelledImage) -> None:
        """Write a sample, if there is room for it."""
        image, truth = found
        num_bytes = image.nbytes + truth.nbytes
        with self._lock:
            if self._file is None or sample in self._begun or num_bytes > self._free_bytes:
                return
            self._begun.add(sample)
            self._free_bytes -= num_bytes
            offset, self._end = self._end, self._end + num_bytes
        try:
            num_written = os.pwrite(self._file.fileno(), image.tobytes() + truth.tobytes(), offset)
        except OSError:  # the disk is full: what is kept stays, all else is decoded again
            num_written = 0
        if num_written == num_bytes:
            self._places[sample] = _Place(offset, image.shape, truth.shape, truth.dtype)
        else:
            self._free_bytes = 0

    def read(self, sample: Sample) -> LabelledImage | None:
        """Return a sample, or None if it is not kept."""
        place = self._places.get(sample)
        if place is None or self._file is None:
            return None
        num_image_bytes = math.prod(place.image_shape)
        num_bytes = num_image_bytes + math.prod(place.truth_shape) * place.truth_dtype.itemsize
        try:
            content = os.pread(self._file.fileno(), num_bytes, place.offset)
        except OSError:  # of a disk that fails: the source is still there
            content = b""
        if len(content) < num_bytes:
            return None
        image = np.frombuffer(content, np.uint8, num_image_bytes).reshape(place.image_shape)
        truth = np.frombuffer(content, place.truth_dtype, offset=num_image_bytes).reshape(place.truth_shape)
        return image, truth


def _open_nameless() -> IO[bytes]:
    try:
        return TemporaryFile(prefix="segray-samples-")
    except OSError as error:
        raise StorageError(
            f"train.cache_disk_bytes: cannot write to {gettempdir()}: {flatten_message(error)}; name another folder in "
            "TMPDIR, or set it to 0"
        ) from error
