"""CPU stage: a fragment number to images at the model's input size. A bad image becomes an error, not an exception."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.config import SegmentSettings
from segray.data.classes import ClassMap
from segray.data.images import decode_image_reduced, decode_image_with_note, resize_image
from segray.data.samples import decode_truth, fetch_image, fetch_mask
from segray.errors import FaultKind, ImageFault
from segray.runs.plan import load_fragment
from segray.runtime.connect import release_memory
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.segmentation.stages.ledger import MAX_DEATHS_PER_IMAGE, LedgerClient, Orders

_MAX_AHEAD_BYTES = 128 * 2**20  # of encoded files on their way or waiting, if all are like the largest so far
_GUESSED_BYTES = 32 * 2**20  # of the first ones of a list, which says no sizes
_LARGE_PX = 2**24  # images from here on leave more memory behind than a process that decodes should keep
_ROW = pa.struct(
    [
        ("uri", pa.string()),
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
        ("note", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
DECODED_SCHEMA = pa.schema(
    [
        ("fragment", pa.int64()),
        ("rows", pa.large_list(_ROW)),  # every planned image, in plan order
        ("images", pa.large_binary()),  # (n, H, W, 3) uint8 of the n images without an error, in plan order
        ("truths", pa.large_list(pa.large_binary())),  # their class-index maps at their own size; null without truth
        ("steps", STEPS_TYPE),
    ]
)


@dataclass(frozen=True)
class _Fetched:
    """The files of one planned image, still encoded."""

    image: bytes
    mask: bytes | None
    mask_fault: ImageFault | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.image) + len(self.mask or b"")


@dataclass(frozen=True)
class DecodedImage:
    """One planned image: its pixels, or why there are none."""

    row: dict[str, Any]
    image: npt.NDArray[np.uint8] | None = None
    truth: npt.NDArray[np.integer] | None = None


class FragmentDecoder:
    """Maps rows of fragment numbers to rows of ``DECODED_SCHEMA``."""

    def __init__(
        self,
        output_uri: str,
        cut_sha256: str,
        classes: ClassMap,
        image_size: tuple[int, int],
        settings: SegmentSettings,
        has_truth: bool,
        ledger: LedgerClient,
    ) -> None:
        self._output_uri = output_uri
        self._cut_sha256 = cut_sha256
        self._classes = classes
        self._image_size = image_size
        self._max_image_px = settings.max_image_px
        self._reduces_jpeg = settings.reduce_jpeg
        self._num_fetch_threads = settings.num_fetch_threads
        self._has_truth = has_truth
        self._ledger = ledger

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read and decode one fragment.

        Raises:
            StorageError: The store refused or failed; that an image is not there any more is its error row.
        """
        fragment = batch["fragment"][0].as_py()
        orders = self._ledger.begin(fragment)
        planned = load_fragment(self._output_uri, self._cut_sha256, fragment).to_pylist()
        watch = Stopwatch()
        if orders.is_careful:
            decoded = self._decode_carefully(fragment, planned, orders, watch)
        else:
            decoded = self._decode_all(planned, watch)
        packed = pack_decoded(fragment, decoded, watch)
        if any((item.row.get("height") or 0) * (item.row.get("width") or 0) > _LARGE_PX for item in decoded):
            release_memory()
        self._ledger.end(fragment, orders)
        return packed

    def _decode_all(self, planned: list[dict[str, Any]], watch: Stopwatch) -> list[DecodedImage]:
        """Fetch in many threads, which wait for the store, and decode in this one: the task has one CPU."""
        pool = ThreadPoolExecutor(self._num_fetch_threads)
        fetching: deque[Future[_Fetched]] = deque()
        decoded: list[DecodedImage | None] = []
        largest_bytes = max((image["size_bytes"] or 0 for image in planned), default=0)
        try:
            for number, image in enumerate(planned):
                num_ahead = min(self._num_fetch_threads, _MAX_AHEAD_BYTES // (largest_bytes or _GUESSED_BYTES))
                for later in planned[number + len(fetching) : number + max(1, num_ahead)]:
                    fetching.append(pool.submit(self._fetch_beside, later, watch))
                fetched = fetching.popleft()
                try:
                    decoded.append(self._decode(image, fetched.result, watch))
                except MemoryError:  # beside others it was too much; alone it may do
                    decoded.append(None)
                if fetched.exception() is None:
                    largest_bytes = max(largest_bytes, fetched.result().num_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
        return [item or self._decode_alone(image, watch) for item, image in zip(decoded, planned, strict=True)]

    def _fetch_beside(self, image: dict[str, Any], watch: Stopwatch) -> _Fetched:
        """Fetch in a thread of its own: that it waits is nothing that the stage waits for."""
        began_s = time.thread_time()
        try:
            return self._fetch(image)
        finally:
            watch.add(Step.FETCH, 0, time.thread_time() - began_s)

    def _decode_carefully(
        self, fragment: int, planned: list[dict[str, Any]], orders: Orders, watch: Stopwatch
    ) -> list[DecodedImage]:
        decoded = {}
        for index in orders.sort(len(planned)):
            if index in orders.failed:
                message = f"the process decoding it died {MAX_DEATHS_PER_IMAGE} times"
                decoded[index] = _fail(planned[index], FaultKind.FAILED, message)
            else:
                self._ledger.enter(fragment, orders, index)
                decoded[index] = self._decode_alone(planned[index], watch)
        self._ledger.enter(fragment, orders, None)
        return [decoded[index] for index in range(len(planned))]

    def _decode_alone(self, image: dict[str, Any], watch: Stopwatch) -> DecodedImage:
        try:
            return self._decode(image, lambda: self._fetch(image), watch)
        except MemoryError:
            return _fail(image, FaultKind.FAILED, "not enough memory to decode it; see segment.max_image_px")

    def _fetch(self, planned: dict[str, Any]) -> _Fetched:
        image = fetch_image(planned["uri"], planned["etag"])
        if not self._has_truth or planned["mask_uri"] is None:
            return _Fetched(image, None)
        try:
            return _Fetched(image, fetch_mask(planned["mask_uri"], planned["mask_etag"]))
        except ImageFault as fault:  # of the mask; what is wrong with the image comes first
            return _Fetched(image, None, fault)

    def _decode(self, planned: dict[str, Any], fetch: Callable[[], _Fetched], watch: Stopwatch) -> DecodedImage:
        row: dict[str, Any] = {"uri": planned["uri"]}
        try:
            with watch.measure(Step.FETCH):
                fetched = fetch()
            with watch.measure(Step.DECODE):
                image, size, note = self._decode_image(fetched.image)
                row |= {"height": size[0], "width": size[1], "note": note}
                truth = self._decode_truth(fetched, size) if self._has_truth else None
                return DecodedImage(row, resize_image(image, self._image_size), truth)
        except ImageFault as fault:
            return _fail(row, fault.kind, str(fault))

    def _decode_image(self, content: bytes) -> tuple[npt.NDArray[np.uint8], tuple[int, ...], str | None]:
        """Return an image, the height and width that its mask will have, and its note."""
        if self._reduces_jpeg:
            return decode_image_reduced(content, self._max_image_px, self._image_size)
        image, note = decode_image_with_note(content, self._max_image_px)
        return image, image.shape[:2], note

    def _decode_truth(self, fetched: _Fetched, size: tuple[int, ...]) -> npt.NDArray[np.integer]:
        if fetched.mask_fault is not None:
            raise fetched.mask_fault
        if fetched.mask is None:
            raise ImageFault(FaultKind.MASK_MISSING, "no mask of this name under --masks, or none in the manifest")
        return decode_truth(fetched.mask, size, self._classes, self._max_image_px)


def _fail(image: dict[str, Any], kind: FaultKind, message: str) -> DecodedImage:
    known: dict[str, Any] = {name: image[name] for name in ("uri", "height", "width") if name in image}
    return DecodedImage({**known, "error_kind": str(kind), "error_message": message})


def pack_decoded(fragment: int, decoded: Sequence[DecodedImage], watch: Stopwatch) -> pa.Table:
    """Return a fragment as one row of ``DECODED_SCHEMA``."""
    with watch.measure(Step.PACK):
        usable = [item for item in decoded if item.image is not None]
        images = b"".join(np.ascontiguousarray(item.image).data for item in usable)
        columns = {
            "fragment": [fragment],
            "rows": [[item.row for item in decoded]],
            "images": _wrap_bytes(images),
            "truths": [[None if item.truth is None else item.truth.tobytes() for item in usable]],
        }
    return pa.table({**columns, "steps": [watch.to_rows()]}, schema=DECODED_SCHEMA)


def _wrap_bytes(content: bytes) -> pa.Array:
    """Return a column of one value without copying it."""
    offsets = pa.py_buffer(np.array([0, len(content)], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(content)])
