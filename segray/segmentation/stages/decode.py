"""CPU stage: reads, decodes and resizes the images of a fragment. An image that cannot be used becomes an error row."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.data.images import decode_image_reduced, decode_image_with_note, resize_image
from segray.data.samples import decode_truth, fetch_image, fetch_mask
from segray.errors import FaultKind, ImageFault
from segray.runs.plan import load_fragment
from segray.runtime.connect import release_memory
from segray.runtime.failures import named_failure
from segray.segmentation.job import PipelineJob
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.segmentation.stages.attempt import AttemptPlan
from segray.segmentation.stages.compression import compress
from segray.segmentation.stages.ledger_client import LedgerClient
from segray.segmentation.stages.time_limit import limited_time

# Limit of the encoded files that are being fetched or wait to be decoded. Each is assumed to be as large as the largest
# file so far.
_MAX_AHEAD_BYTES = 128 * 2**20
_GUESSED_BYTES = 32 * 2**20  # Assumed size until the first file is fetched, if the listing has no sizes.
_LARGE_PX = 2**24  # After a larger image, the decode process returns its freed memory to the system.
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
        ("rows", pa.large_list(_ROW)),  # all planned images, in plan order
        ("images", pa.large_binary()),  # (n, H, W, 3) uint8 of the n images without an error, in plan order
        ("truths", pa.large_list(pa.large_binary())),  # compressed class-index maps at the images' own sizes, or null
        ("steps", STEPS_TYPE),
    ]
)


@dataclass(frozen=True)
class _Fetched:
    """The encoded files of one planned image."""

    image: bytes
    mask: bytes | None
    mask_fault: ImageFault | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.image) + len(self.mask or b"")


@dataclass(frozen=True)
class DecodedImage:
    """One planned image after decoding.

    Attributes:
        row: Columns of the rows in ``DECODED_SCHEMA``; columns without a value are null.
        image: (h, w, 3) uint8 at the model's input size; None if the image is an error row.
        truth: (H, W) class indices at the image's own size, compressed; None without ground truth.
    """

    row: dict[str, Any]
    image: npt.NDArray[np.uint8] | None = None
    truth: bytes | None = None


class FragmentDecoder:
    """Maps rows of fragment numbers to rows of ``DECODED_SCHEMA``."""

    def __init__(self, job: PipelineJob, ledger: LedgerClient) -> None:
        self._job = job
        self._num_fetch_threads = job.settings.num_fetch_threads
        self._ledger = ledger

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read and decode one fragment.

        Raises:
            StorageError: The store refused the request or failed. An image that was removed, or that cannot
                be read although its folder can, is an error row instead.
            ClusterError: Processes die repeatedly on the fragment and no image explains it, or an unexpected exception
                was raised.
        """
        fragment = batch["fragment"][0].as_py()
        with named_failure(f"decoding fragment {fragment}"):
            return self._decode_fragment(fragment)

    def _decode_fragment(self, fragment: int) -> pa.Table:
        attempt_plan = self._ledger.begin(fragment)
        planned = load_fragment(self._job.output_uri, self._job.cut_sha256, fragment).to_pylist()
        watch = Stopwatch()
        if attempt_plan.one_by_one:
            decoded = self._decode_one_by_one(fragment, planned, attempt_plan, watch)
        else:
            decoded = self._decode_all(planned, watch)
        packed = pack_decoded(fragment, decoded, watch)
        if any((item.row.get("height") or 0) * (item.row.get("width") or 0) > _LARGE_PX for item in decoded):
            release_memory()
        self._ledger.end(fragment, attempt_plan)
        return packed

    def _decode_all(self, planned: list[dict[str, Any]], watch: Stopwatch) -> list[DecodedImage]:
        """Decode in this thread, since the task has one CPU, while other threads fetch the next files."""
        pool = ThreadPoolExecutor(self._num_fetch_threads)
        fetching: deque[Future[_Fetched]] = deque()
        decoded: list[DecodedImage | None] = []
        largest_bytes = max((image["size_bytes"] or 0 for image in planned), default=0)
        try:
            for number, image in enumerate(planned):
                num_ahead = min(self._num_fetch_threads, _MAX_AHEAD_BYTES // (largest_bytes or _GUESSED_BYTES))
                for later in planned[number + len(fetching) : number + max(1, num_ahead)]:
                    fetching.append(pool.submit(self._fetch_in_thread, later, watch))
                fetched = fetching.popleft()
                try:
                    decoded.append(self._decode(image, fetched.result, watch))
                except MemoryError:  # Retried below, without other files in memory.
                    decoded.append(None)
                if fetched.exception() is None:
                    largest_bytes = max(largest_bytes, fetched.result().num_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
        return [item or self._decode_alone(image, watch) for item, image in zip(decoded, planned, strict=True)]

    def _fetch_in_thread(self, image: dict[str, Any], watch: Stopwatch) -> _Fetched:
        """Fetch files and count only the CPU time; the wall time does not delay the stage unless ``_decode`` waits."""
        began_s = time.thread_time()
        try:
            return self._fetch(image)
        finally:
            watch.add(Step.FETCH, 0, time.thread_time() - began_s)

    def _decode_one_by_one(
        self, fragment: int, planned: list[dict[str, Any]], attempt_plan: AttemptPlan, watch: Stopwatch
    ) -> list[DecodedImage]:
        """Decode one image after another, and record each in the ledger beforehand."""
        release_memory()  # What this process has kept of other fragments must not add to the memory of a suspect.
        decoded = {
            index: _fail(planned[index], failure.kind, failure.message)
            for index, failure in attempt_plan.failed.items()
        }
        decoded |= self._ledger.process_one_by_one(
            fragment,
            attempt_plan,
            attempt_plan.order_images(len(planned)),
            lambda index: self._decode_alone(planned[index], watch),
        )
        return [decoded[index] for index in range(len(planned))]

    def _decode_alone(self, image: dict[str, Any], watch: Stopwatch) -> DecodedImage:
        """Fetch and decode one image while no other is being fetched; too little memory makes it an error row."""
        try:
            return self._decode(image, lambda: self._fetch(image), watch)
        except MemoryError:
            return _fail(image, FaultKind.FAILED, "not enough memory to decode this image; see segment.max_image_px")

    def _fetch(self, planned: dict[str, Any]) -> _Fetched:
        image = fetch_image(planned["uri"], planned["etag"])
        if not self._job.has_truth or planned["mask_uri"] is None:
            return _Fetched(image, None)
        try:
            return _Fetched(image, fetch_mask(planned["mask_uri"], planned["mask_etag"]))
        except ImageFault as fault:  # Raised after the image is decoded, whose own fault takes precedence.
            return _Fetched(image, None, fault)

    def _decode(self, planned: dict[str, Any], fetch: Callable[[], _Fetched], watch: Stopwatch) -> DecodedImage:
        row: dict[str, Any] = {"uri": planned["uri"]}
        with named_failure(f"decoding {planned['uri']} of fragment {planned['fragment']}", passed=(MemoryError,)):
            try:
                with watch.measure(Step.FETCH):
                    fetched = fetch()
                with watch.measure(Step.DECODE), limited_time(self._job.settings.image_timeout_s):
                    image, size, note = self._decode_image(fetched.image)
                    row |= {"height": size[0], "width": size[1], "note": note}
                    truth = self._decode_truth(fetched, size) if self._job.has_truth else None
                    return DecodedImage(row, resize_image(image, self._job.image_size), truth)
            except ImageFault as fault:
                return _fail(row, fault.kind, str(fault))

    def _decode_image(self, content: bytes) -> tuple[npt.NDArray[np.uint8], tuple[int, ...], str | None]:
        """Return an image (h, w, 3) uint8, the height and width that its mask will have, and its note."""
        settings = self._job.settings
        if settings.reduce_jpeg:
            return decode_image_reduced(content, settings.max_image_px, self._job.image_size)
        image, note = decode_image_with_note(content, settings.max_image_px)
        return image, image.shape[:2], note

    def _decode_truth(self, fetched: _Fetched, size: tuple[int, ...]) -> bytes:
        """Return the ground truth, (H, W) class indices of ``size``, compressed."""
        if fetched.mask_fault is not None:
            raise fetched.mask_fault
        if fetched.mask is None:
            raise ImageFault(
                FaultKind.MASK_MISSING,
                "no mask of this name under --masks, or no mask_uri in the manifest",
            )
        truth = decode_truth(fetched.mask, size, self._job.classes, self._job.settings.max_image_px)
        return compress(np.ascontiguousarray(truth))


def _fail(image: dict[str, Any], kind: FaultKind, message: str) -> DecodedImage:
    """Return an error row with the URI of the image, and its size if that is known."""
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
            "truths": [[item.truth for item in usable]],
        }
    return pa.table({**columns, "steps": [watch.to_rows()]}, schema=DECODED_SCHEMA)


def _wrap_bytes(content: bytes) -> pa.Array:
    """Return a column with one value, without copying it."""
    offsets = pa.py_buffer(np.array([0, len(content)], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(content)])
