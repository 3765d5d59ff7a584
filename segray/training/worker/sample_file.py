"""Decoded samples in an unnamed file in memory or on disk, which the other ranks of the node read, too.

The ranks of a node share it because each reads other samples in each epoch: with 8 ranks that keep samples only for
themselves, one sample in 8 would be found in the second epoch. The system frees the file when the last process that has
it open ends, even if it is killed. A file in memory is not in ``/dev/shm``, which is often small and holds Ray's
objects.
"""

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryFile, gettempdir
from threading import Lock
from typing import IO

import numpy as np
import numpy.typing as npt

from segray.errors import StorageError, flatten_message

LabelledImage = tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]
_HEADER = struct.Struct("<16s5I")  # Key, height and width of image and truth, bytes per truth pixel.
_FLAG_BYTES = 4  # The last field, which is not 0 once the sample is written.


@dataclass(frozen=True)
class _Location:
    """Location of a sample in the file: the bytes of the image, followed by those of the class-index map."""

    offset: int
    image_shape: tuple[int, int, int]
    truth_shape: tuple[int, int]
    truth_dtype: np.dtype[np.integer]

    @property
    def num_image_bytes(self) -> int:
        return int(np.prod(self.image_shape))

    @property
    def num_bytes(self) -> int:
        return self.num_image_bytes + int(np.prod(self.truth_shape)) * self.truth_dtype.itemsize


class SampleFile:
    """Samples that one process appends, and that any process of the node reads; thread-safe.

    Samples are never evicted: each epoch reads every sample once, so evicting the oldest would remove each sample just
    before it is needed again.

    Args:
        file: The file. The object takes it over.
        max_bytes: Limit of its size.
    """

    def __init__(self, file: IO[bytes], max_bytes: int = 0) -> None:
        self._file = file
        self._free_bytes = max_bytes
        self._end = 0
        self._claimed: set[bytes] = set()
        self._locations: dict[bytes, _Location] = {}
        self._lock = Lock()

    @property
    def path(self) -> str:
        """Path by which other processes of the same user and node open the file while this process runs."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def write(self, key: bytes, found: LabelledImage) -> bool:
        """Write a sample under a key of 16 bytes, unless another thread does; return False if it does not fit."""
        image, truth = found
        header = _HEADER.pack(key, *image.shape[:2], *truth.shape, truth.itemsize)
        num_bytes = len(header) + image.nbytes + truth.nbytes
        with self._lock:
            if key in self._claimed:
                return True
            if num_bytes > self._free_bytes:
                return False
            self._claimed.add(key)
            self._free_bytes -= num_bytes
            offset, self._end = self._end, self._end + num_bytes
        content = image.tobytes() + truth.tobytes()
        flag = len(header) - _FLAG_BYTES
        parts = ((offset + len(header), content), (offset, header[:flag]), (offset + flag, header[flag:]))
        try:  # The flag last: a reader that sees it finds the rest complete.
            is_written = all(os.pwrite(self._file.fileno(), part, position) == len(part) for position, part in parts)
        except OSError:  # The disk is full: samples already written stay, all others are decoded again.
            is_written = False
        if not is_written:
            self._free_bytes = 0
            return False
        self._locations[key] = _parse(header, offset)[1]
        return True

    def refresh(self) -> None:
        """Find the samples that the process that owns the file has written since the last call."""
        with self._lock, suppress(OSError):  # A disk error: what it has hidden is decoded from its source.
            while True:
                flag = os.pread(self._file.fileno(), _FLAG_BYTES, self._end + _HEADER.size - _FLAG_BYTES)
                if int.from_bytes(flag, "little") not in (1, 2, 4, 8):  # Nothing yet, or not a file of samples.
                    return
                header = os.pread(self._file.fileno(), _HEADER.size, self._end)
                key, location = _parse(header, self._end)
                self._end = location.offset + location.num_bytes
                self._locations[key] = location

    def __contains__(self, key: bytes) -> bool:
        return key in self._locations

    def read(self, key: bytes) -> LabelledImage | None:
        """Return a sample, or None if it is not in the file."""
        location = self._locations.get(key)
        if location is None:
            return None
        try:
            content = os.pread(self._file.fileno(), location.num_bytes, location.offset)
        except OSError:  # A disk error: the sample is decoded from its source again.
            return None
        if len(content) < location.num_bytes:
            return None
        image = np.frombuffer(content, np.uint8, location.num_image_bytes).reshape(location.image_shape)
        truth = np.frombuffer(content, location.truth_dtype, offset=location.num_image_bytes)
        return image, truth.reshape(location.truth_shape)


def _parse(header: bytes, offset: int) -> tuple[bytes, _Location]:
    key, height, width, truth_height, truth_width, itemsize = _HEADER.unpack(header)
    shapes = (height, width, 3), (truth_height, truth_width)
    return key, _Location(offset + _HEADER.size, *shapes, np.dtype(f"u{itemsize}"))


def create_in_memory(max_bytes: int) -> SampleFile:
    """Create a file in memory."""
    return SampleFile(os.fdopen(os.memfd_create("segray-samples"), "w+b"), max_bytes)


def create_on_disk(max_bytes: int) -> SampleFile:
    """Create a file in the folder named by ``TMPDIR``.

    Raises:
        StorageError: The folder cannot be written to.
    """
    try:
        return SampleFile(TemporaryFile(prefix="segray-samples-"), max_bytes)
    except OSError as error:
        raise StorageError(
            f"train.cache_disk_bytes: cannot write to {gettempdir()}: {flatten_message(error)}; set TMPDIR to "
            "another folder, or set train.cache_disk_bytes: 0"
        ) from error


def open_shared(path: str) -> SampleFile | None:
    """Open the file of another rank of the node by its ``path``; None if the system does not allow it."""
    try:
        if os.path.isfile(path):  # In another PID namespace it may be anything.
            return SampleFile(open(path, "rb", buffering=0))
    except OSError:
        pass
    return None
