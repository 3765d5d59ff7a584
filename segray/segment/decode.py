"""CPU stage: a fragment number to images at the model's input size. A bad image becomes an error, not an exception."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.classes import ClassMap
from segray.errors import FaultKind, ImageFault
from segray.images import resize_image
from segray.samples import read_image_with_note, read_truth
from segray.segment.ledger import MAX_DEATHS_PER_IMAGE, LedgerClient, Orders
from segray.segment.plan import load_fragment

_NUM_THREADS = 4  # an object store answers in tens of milliseconds, in which other images can be decoded

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
    ]
)


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
        max_image_px: int,
        has_truth: bool,
        ledger: LedgerClient,
    ) -> None:
        self._output_uri = output_uri
        self._cut_sha256 = cut_sha256
        self._classes = classes
        self._image_size = image_size
        self._max_image_px = max_image_px
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
        decoded = self._decode_carefully(fragment, planned, orders) if orders.is_careful else self._decode_all(planned)
        packed = pack_decoded(fragment, decoded)
        self._ledger.end(fragment, orders)
        return packed

    def _decode_all(self, planned: list[dict[str, Any]]) -> list[DecodedImage]:
        def decode(image: dict[str, Any]) -> DecodedImage | None:
            try:
                return self._decode(image)
            except MemoryError:  # beside others it was too much; alone it may do
                return None

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            decoded = list(pool.map(decode, planned))
        return [item or self._decode_alone(image) for item, image in zip(decoded, planned, strict=True)]

    def _decode_carefully(self, fragment: int, planned: list[dict[str, Any]], orders: Orders) -> list[DecodedImage]:
        decoded = {}
        for index in orders.sort(len(planned)):
            if index in orders.failed:
                message = f"the process decoding it died {MAX_DEATHS_PER_IMAGE} times"
                decoded[index] = _fail(planned[index], FaultKind.FAILED, message)
            else:
                self._ledger.enter(fragment, orders, index)
                decoded[index] = self._decode_alone(planned[index])
        self._ledger.enter(fragment, orders, None)
        return [decoded[index] for index in range(len(planned))]

    def _decode_alone(self, image: dict[str, Any]) -> DecodedImage:
        try:
            return self._decode(image)
        except MemoryError:
            return _fail(image, FaultKind.FAILED, "not enough memory to decode it; see segment.max_image_px")

    def _decode(self, planned: dict[str, Any]) -> DecodedImage:
        row: dict[str, Any] = {"uri": planned["uri"]}
        try:
            image, note = read_image_with_note(planned["uri"], self._max_image_px, planned["etag"])
            row |= {"height": image.shape[0], "width": image.shape[1], "note": note}
            truth = self._read_truth(planned, image.shape[:2]) if self._has_truth else None
        except ImageFault as fault:
            return _fail(row, fault.kind, str(fault))
        return DecodedImage(row, resize_image(image, self._image_size), truth)

    def _read_truth(self, planned: dict[str, Any], size: tuple[int, ...]) -> npt.NDArray[np.integer]:
        if planned["mask_uri"] is None:
            raise ImageFault(FaultKind.MASK_MISSING, "no mask of this name under --masks, or none in the manifest")
        return read_truth(planned["mask_uri"], size, self._classes, self._max_image_px, planned["mask_etag"])


def _fail(image: dict[str, Any], kind: FaultKind, message: str) -> DecodedImage:
    known: dict[str, Any] = {name: image[name] for name in ("uri", "height", "width") if name in image}
    return DecodedImage({**known, "error_kind": str(kind), "error_message": message})


def pack_decoded(fragment: int, decoded: Sequence[DecodedImage]) -> pa.Table:
    """Return a fragment as one row of ``DECODED_SCHEMA``."""
    usable = [item for item in decoded if item.image is not None]
    images = np.stack([item.image for item in usable if item.image is not None]).tobytes() if usable else b""
    columns = {
        "fragment": [fragment],
        "rows": [[item.row for item in decoded]],
        "images": [images],
        "truths": [[None if item.truth is None else item.truth.tobytes() for item in usable]],
    }
    return pa.table(columns, schema=DECODED_SCHEMA)
