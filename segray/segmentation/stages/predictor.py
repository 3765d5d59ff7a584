"""GPU or CPU stage: runs the model on decoded fragments, and returns complete rows with raw masks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.errors import BundleError, FaultKind, SegrayError
from segray.runtime.connect import skip_exit_handlers
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import PipelineJob
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.segmentation.stages.ledger import MAX_DEATHS_PER_IMAGE, AttemptPlan, LedgerClient

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
class _UsableImage:
    """An image that could be decoded.

    Attributes:
        index: Its index in the fragment.
        row: Its columns so far; the prediction adds the others.
        pixels: (h, w, 3) uint8 at the model's input size.
        truth: Its class-index map at its own size; None without ground truth.
    """

    index: int
    row: dict[str, Any]
    pixels: npt.NDArray[np.uint8] = field(init=False)
    truth: pa.Buffer | None = None


class FragmentPredictor:
    """Maps rows of ``DECODED_SCHEMA`` to rows of ``PREDICTED_SCHEMA``; each predictor process has one.

    Args:
        job: What the stages share; the model is loaded from its bundle.
        num_predictors_per_node: Number of predictors that share the cores of a node, if there is no GPU.
        ledger: Records which fragment and image are being processed.
    """

    def __init__(self, job: PipelineJob, num_predictors_per_node: int, ledger: LedgerClient) -> None:
        self._ledger = ledger
        self._batch_size = job.settings.batch_size
        self._error: SegrayError | None = None
        self._idle_since_s: float | None = None
        skip_exit_handlers()
        try:
            ledger.start_predictor()
            # Imported here, because the driver imports this module, and importing torch and smp takes 8 s.
            from segray.models.bundle import load_bundle
            from segray.segmentation.stages.inference import Inference

            bundle = load_bundle(job.bundle_uri)
            if bundle.sha256 != job.bundle_sha256:
                raise BundleError(f"{job.bundle_uri}: replaced during the run; restore it, or choose another --output")
            self._inference = Inference(bundle, job.settings, num_predictors_per_node)
        except SegrayError as error:  # Raised by __call__: Ray keeps only the text of errors in constructors.
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Predict one fragment.

        Raises:
            SegrayError: The bundle cannot be used, or the model cannot run on this device.
        """
        if self._error is not None:
            raise self._error
        watch = Stopwatch(time.process_time)
        if self._idle_since_s is not None:
            watch.add(Step.WAIT, time.perf_counter() - self._idle_since_s)
        decoded = batch.to_batches()[0]
        fragment = decoded["fragment"][0].as_py()
        rows = decoded["rows"][0].as_py()
        attempt_plan = self._ledger.begin(fragment)
        pixels = np.frombuffer(decoded["images"][0].as_buffer(), np.uint8).reshape(-1, *self._inference.image_size, 3)
        usable = [_UsableImage(index, row) for index, row in enumerate(rows) if row["error_kind"] is None]
        for position, truth in enumerate(decoded["truths"][0]):
            usable[position].pixels = pixels[position]
            usable[position].truth = truth.as_buffer() if truth.is_valid else None
        if attempt_plan.one_by_one:
            self._predict_one_by_one(fragment, usable, attempt_plan, watch)
        else:
            self._predict(usable, watch)
        with watch.measure(Step.COUNT):
            for row in rows:
                row["status"] = "ok" if row["error_kind"] is None else "error"
            field = PREDICTED_SCHEMA.field("rows")
            columns = {"fragment": decoded["fragment"], "rows": pa.array([rows], field.type)}
        columns["steps"] = pa.array([decoded["steps"][0].as_py() + watch.to_rows()], STEPS_TYPE)
        predicted = pa.table(columns, schema=PREDICTED_SCHEMA)
        self._ledger.end(fragment, attempt_plan)
        self._idle_since_s = time.perf_counter()
        return predicted

    def _predict_one_by_one(
        self, fragment: int, images: Sequence[_UsableImage], attempt_plan: AttemptPlan, watch: Stopwatch
    ) -> None:
        """Predict one image after another, and record each in the ledger beforehand.

        Batches are padded to one fixed shape, so results have the same bits as in a full batch.
        """
        by_index = {image.index: image for image in images}
        for index in attempt_plan.order_images(1 + max(by_index, default=-1)):
            if index not in by_index:
                continue
            image = by_index[index]
            if index in attempt_plan.failed:
                message = f"the worker process died {MAX_DEATHS_PER_IMAGE} times while predicting this image"
                image.row |= {"error_kind": str(FaultKind.FAILED), "error_message": message, "note": None}
            else:
                self._ledger.record_image(fragment, attempt_plan, index)
                self._predict([image], watch)
        self._ledger.record_image(fragment, attempt_plan, None)

    def _predict(self, images: Sequence[_UsableImage], watch: Stopwatch) -> None:
        """Add the prediction's columns to the rows; the next batch is launched before one is finished."""
        in_flight: deque[tuple[Sequence[_UsableImage], Launched]] = deque()
        for start in range(0, len(images), self._batch_size):
            batch = images[start : start + self._batch_size]
            sizes = [(image.row["height"], image.row["width"]) for image in batch]
            in_flight.append((batch, self._inference.launch([image.pixels for image in batch], sizes, watch)))
            if len(in_flight) > 1:
                self._finish(*in_flight.popleft(), watch)
        for batch, launched in in_flight:
            self._finish(batch, launched, watch)

    def _finish(self, batch: Sequence[_UsableImage], launched: Launched, watch: Stopwatch) -> None:
        columns = self._inference.finish(launched, [image.truth for image in batch], watch)
        for image, predicted in zip(batch, columns, strict=True):
            image.row |= predicted
