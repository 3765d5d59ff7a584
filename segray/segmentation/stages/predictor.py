"""GPU (or CPU) stage: holds the model, and maps decoded fragments to finished rows with raw masks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.config import SegmentSettings
from segray.errors import FaultKind, SegrayError
from segray.runtime.connect import skip_exit_handlers
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.segmentation.stages.ledger import MAX_DEATHS_PER_IMAGE, LedgerClient, Orders

if TYPE_CHECKING:
    from segray.segmentation.stages.inference import Launched

PREDICTED_SCHEMA = pa.schema(
    [
        ("fragment", pa.int64()),
        ("rows", pa.large_list(pa.struct(list(IMAGES_SCHEMA)))),
        ("steps", STEPS_TYPE),
    ]
)


@dataclass
class _Usable:
    """An image that could be decoded: its place in the fragment, its row so far, its pixels and its ground truth."""

    index: int
    row: dict[str, Any]
    pixels: npt.NDArray[np.uint8] = field(init=False)
    truth: pa.Buffer | None = None


class FragmentPredictor:
    """Maps rows of ``DECODED_SCHEMA`` to rows of ``PREDICTED_SCHEMA``; one in each predictor process.

    Args:
        bundle_uri: The model.
        bundle_sha256: What the run was planned with; a bundle that was replaced since is refused.
        settings: What ``Inference`` needs of them.
        num_predictors_per_node: Predictors that share the cores of a node where there is no GPU.
        ledger: Where to say what is being worked on.
    """

    def __init__(
        self,
        bundle_uri: str,
        bundle_sha256: str,
        settings: SegmentSettings,
        num_predictors_per_node: int,
        ledger: LedgerClient,
    ) -> None:
        self._ledger = ledger
        self._batch_size = settings.batch_size
        self._error: SegrayError | None = None
        self._idle_since_s: float | None = None
        skip_exit_handlers()
        try:
            ledger.start_predictor()
            from segray.segmentation.stages.inference import (
                Inference,  # 8 s of torch and smp, which the driver need not wait for
            )

            self._inference = Inference(bundle_uri, bundle_sha256, settings, num_predictors_per_node)
        except SegrayError as error:  # raised with the first fragment: of a constructor's error Ray keeps only the text
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Predict one fragment.

        Raises:
            SegrayError: The bundle cannot be used.
        """
        if self._error is not None:
            raise self._error
        watch = Stopwatch(time.process_time)
        if self._idle_since_s is not None:
            watch.add(Step.WAIT, time.perf_counter() - self._idle_since_s)
        decoded = batch.to_batches()[0]
        fragment = decoded["fragment"][0].as_py()
        rows = decoded["rows"][0].as_py()
        orders = self._ledger.begin(fragment)
        pixels = np.frombuffer(decoded["images"][0].as_buffer(), np.uint8).reshape(-1, *self._inference.image_size, 3)
        usable = [_Usable(index, row) for index, row in enumerate(rows) if row["error_kind"] is None]
        for position, truth in enumerate(decoded["truths"][0]):
            usable[position].pixels = pixels[position]
            usable[position].truth = truth.as_buffer() if truth.is_valid else None
        if orders.is_careful:
            self._predict_carefully(fragment, usable, orders, watch)
        else:
            self._predict(usable, watch)
        with watch.measure(Step.COUNT):
            for row in rows:
                row["status"] = "ok" if row["error_kind"] is None else "error"
            field = PREDICTED_SCHEMA.field("rows")
            columns = {"fragment": decoded["fragment"], "rows": pa.array([rows], field.type)}
        columns["steps"] = pa.array([decoded["steps"][0].as_py() + watch.to_rows()], STEPS_TYPE)
        predicted = pa.table(columns, schema=PREDICTED_SCHEMA)
        self._ledger.end(fragment, orders)
        self._idle_since_s = time.perf_counter()
        return predicted

    def _predict_carefully(self, fragment: int, images: Sequence[_Usable], orders: Orders, watch: Stopwatch) -> None:
        """Predict image after image: batches are padded, so that no bit of a result depends on its neighbours."""
        by_place = {image.index: image for image in images}
        for index in orders.sort(1 + max(by_place, default=-1)):
            if index not in by_place:
                continue
            image = by_place[index]
            if index in orders.failed:
                message = f"the process predicting it died {MAX_DEATHS_PER_IMAGE} times"
                image.row |= {"error_kind": str(FaultKind.FAILED), "error_message": message, "note": None}
            else:
                self._ledger.enter(fragment, orders, index)
                self._predict([image], watch)
        self._ledger.enter(fragment, orders, None)

    def _predict(self, images: Sequence[_Usable], watch: Stopwatch) -> None:
        """Add to the rows what depends on the prediction; the next batch is launched before one is finished."""
        under_way: deque[tuple[Sequence[_Usable], Launched]] = deque()
        for start in range(0, len(images), self._batch_size):
            batch = images[start : start + self._batch_size]
            sizes = [(image.row["height"], image.row["width"]) for image in batch]
            under_way.append((batch, self._inference.launch([image.pixels for image in batch], sizes, watch)))
            if len(under_way) > 1:
                self._finish(*under_way.popleft(), watch)
        for batch, launched in under_way:
            self._finish(batch, launched, watch)

    def _finish(self, batch: Sequence[_Usable], launched: Launched, watch: Stopwatch) -> None:
        columns = self._inference.finish(launched, [image.truth for image in batch], watch)
        for image, predicted in zip(batch, columns, strict=True):
            image.row |= predicted
