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
from segray.samples import read_image, read_truth
from segray.segment.plan import load_fragment

_NUM_THREADS = 4  # an object store answers in tens of milliseconds, in which other images can be decoded

_ROW = pa.struct(
    [
        ("uri", pa.string()),
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
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
        plan_sha256: str,
        classes: ClassMap,
        image_size: tuple[int, int],
        max_image_px: int,
        has_truth: bool,
    ) -> None:
        self._output_uri = output_uri
        self._plan_sha256 = plan_sha256
        self._classes = classes
        self._image_size = image_size
        self._max_image_px = max_image_px
        self._has_truth = has_truth

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read and decode one fragment.

        Raises:
            StorageError: The store refused or failed; that an image is not there any more is its error row.
        """
        fragment = batch["fragment"][0].as_py()
        planned = load_fragment(self._output_uri, self._plan_sha256, fragment).to_pylist()
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return pack_decoded(fragment, list(pool.map(self._decode, planned)))

    def _decode(self, planned: dict[str, Any]) -> DecodedImage:
        row = {"uri": planned["uri"]}
        try:
            image = read_image(planned["uri"], self._max_image_px)
            row |= {"height": image.shape[0], "width": image.shape[1]}
            truth = self._read_truth(planned["mask_uri"], image.shape[:2]) if self._has_truth else None
        except ImageFault as fault:
            return DecodedImage({**row, "error_kind": str(fault.kind), "error_message": str(fault)})
        return DecodedImage(row, resize_image(image, self._image_size), truth)

    def _read_truth(self, uri: str | None, size: tuple[int, ...]) -> npt.NDArray[np.integer]:
        if uri is None:
            raise ImageFault(FaultKind.MASK_MISSING, "no mask of this name under --masks")
        return read_truth(uri, size, self._classes, self._max_image_px)


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
