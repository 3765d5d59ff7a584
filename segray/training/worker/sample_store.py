"""Load samples, and keep them decoded in memory and on disk: reading them back is faster than decoding them again."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

from segray.data.classes import ClassMap
from segray.data.images import decode_image, resize_image, resize_mask
from segray.data.sample_list import Sample
from segray.data.samples import decode_truth, fetch_image, fetch_mask
from segray.errors import DataError, ImageFault
from segray.runtime.failures import named_failure
from segray.storage import is_local
from segray.training.worker.sample_file import (
    LabelledImage,
    SampleFile,
    create_in_memory,
    create_on_disk,
    open_shared,
)

_NUM_READERS = 32  # Threads that wait for storage: 400 samples/s, of two files each, at 40 ms per response.


class SampleSize(NamedTuple):
    """Height and width at which an image and its class-index map are needed; None: the original size."""

    image: tuple[int, int] | None = None
    truth: tuple[int, int] | None = None


ORIGINAL_SIZE = SampleSize()


class EncodedSample(NamedTuple):
    """The encoded files of a sample, as they are read by other threads."""

    image: Future[bytes]
    mask: Future[bytes]


def load_labelled_image(sample: Sample, classes: ClassMap, encoded: EncodedSample | None = None) -> LabelledImage:
    """Read an image (H, W, 3) uint8 and its class-index map (H, W), at the original size.

    Args:
        sample: The URIs of image and mask.
        classes: Classes that the mask values stand for.
        encoded: The files, if they are being read already.

    Raises:
        DataError: The image or mask cannot be used, or their sizes differ.
        StorageError: Permissions, network or disk error.
        ClusterError: An unexpected exception was raised.
    """
    get_image: Callable[[], bytes] = encoded.image.result if encoded else partial(fetch_image, sample.image_uri)
    get_mask: Callable[[], bytes] = encoded.mask.result if encoded else partial(fetch_mask, sample.mask_uri)
    uri = sample.image_uri
    try:
        with named_failure(f"reading {sample.image_uri} and its mask"):
            image = decode_image(get_image())
            uri = sample.mask_uri
            return image, decode_truth(get_mask(), image.shape[:2], classes)
    except ImageFault as fault:
        raise DataError(f"{uri}: {fault.kind}: {fault}; run segray check to list all such files") from fault


class SampleStore:
    """A thread-safe cache of decoded samples, limited in memory and disk, that the ranks of a node can share.

    Args:
        classes: Classes that the mask values stand for.
        max_bytes: Memory for the samples that this rank decodes.
        max_disk_bytes: Disk for samples that do not fit into memory, in the folder named by ``TMPDIR``.
    """

    def __init__(self, classes: ClassMap, max_bytes: int, max_disk_bytes: int = 0) -> None:
        self.classes = classes
        self._own = [create_in_memory(max_bytes)] if max_bytes else []
        if max_disk_bytes:
            self._own.append(create_on_disk(max_disk_bytes))
        self._shared: list[SampleFile] = []
        self._readers = ThreadPoolExecutor(_NUM_READERS, "read-sample")

    @property
    def paths(self) -> list[str]:
        """Paths by which other ranks of the node open this rank's samples; see ``share``."""
        return [file.path for file in self._own]

    def share(self, paths: Sequence[str]) -> None:
        """Read the samples of other ranks of the node, too, whose ``paths`` these are."""
        self._shared = [file for path in paths if (file := open_shared(path))]

    def close(self) -> None:
        """Read no more of the requested files, except those that are being read."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def request(self, sample: Sample, size: SampleSize) -> EncodedSample | None:
        """Start to read the files of a sample, both at a time, unless it is kept or on a disk.

        Files on disks are read where they are decoded, which is faster than handing them over to another thread.
        """
        if is_local(sample.image_uri) or self._find(_hash(sample, size)):
            return None
        return EncodedSample(
            self._readers.submit(fetch_image, sample.image_uri), self._readers.submit(fetch_mask, sample.mask_uri)
        )

    def load(
        self, sample: Sample, size: SampleSize = ORIGINAL_SIZE, encoded: EncodedSample | None = None
    ) -> LabelledImage:
        """Return an image and its class-index map, resized to ``size``. Callers must not modify them.

        Args:
            sample: The URIs of image and mask.
            size: The size to resize them to; they are kept at this size.
            encoded: What ``request`` returned, to use the files that it reads.

        Raises:
            DataError, StorageError, ClusterError: As in ``load_labelled_image``.
        """
        key = _hash(sample, size)
        file = None if encoded else self._find(key)
        found = file.read(key) if file else None
        if found is None:
            image, truth = load_labelled_image(sample, self.classes, encoded)
            found = (
                resize_image(image, size.image) if size.image else image,
                resize_mask(truth, size.truth) if size.truth else truth,
            )
            any(own.write(key, found) for own in self._own)  # Into the first that has space.
        return found

    def _find(self, key: bytes) -> SampleFile | None:
        """Return the file that a sample is in, or None."""
        for file in (*self._own, *self._shared):
            if key in file:
                return file
        for file in self._shared:
            file.refresh()
            if key in file:
                return file
        return None


def _hash(sample: Sample, size: SampleSize) -> bytes:
    return blake2b(repr((*sample, *size)).encode(), digest_size=16).digest()
