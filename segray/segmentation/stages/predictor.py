"""GPU or CPU stage: runs the model on decoded fragments, and returns complete rows with compressed masks."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.errors import BundleError, SegrayError, flatten_message
from segray.runtime.connect import skip_exit_handlers
from segray.runtime.failures import named_failure
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import PipelineJob
from segray.segmentation.profile import STEPS_TYPE, Step, Stopwatch
from segray.segmentation.stages.attempt import AttemptPlan
from segray.segmentation.stages.compression import compress, decompress
from segray.segmentation.stages.ledger_client import LedgerClient
from segray.segmentation.stages.time_limit import limited_time

if TYPE_CHECKING:
    from segray.segmentation.stages.inference import Launched

PREDICTED_SCHEMA = pa.schema(
    [
        ("fragment", pa.int64()),
        ("rows", pa.large_list(pa.struct(list(IMAGES_SCHEMA)))),  # with raw masks, compressed
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
        truth: Its class-index map at its own size, compressed; None without ground truth.
    """

    index: int
    row: dict[str, Any]
    pixels: npt.NDArray[np.uint8]
    truth: pa.Buffer | None


class FragmentPredictor:
    """Maps rows of ``DECODED_SCHEMA`` to rows of ``PREDICTED_SCHEMA``; each predictor process has one.

    Args:
        job: What the stages share; the model is loaded from its bundle.
        ledger: Records which fragment and image are being processed.
    """

    def __init__(self, job: PipelineJob, ledger: LedgerClient) -> None:
        self._ledger = ledger
        self._batch_size = job.settings.batch_size
        self._image_timeout_s = job.settings.image_timeout_s
        self._index_bytes = np.dtype(job.classes.index_dtype).itemsize
        self._error: SegrayError | None = None
        self._idle_since_s: float | None = None
        skip_exit_handlers()
        try:
            with named_failure("loading the model"), self._exit_on_device_error():
                self._load(job)
        except SegrayError as error:  # Raised by __call__: Ray keeps only the text of errors in constructors.
            self._error = error

    def _load(self, job: PipelineJob) -> None:
        self._ledger.start_predictor()
        # Imported here, because the driver imports this module, and importing torch and smp takes 8 s.
        from segray.models.bundle import load_bundle
        from segray.segmentation.stages.inference import Inference

        bundle = load_bundle(job.bundle_uri)
        if bundle.sha256 != job.bundle_sha256:
            raise BundleError(f"{job.bundle_uri}: replaced during the run; restore it, or choose another --output")
        self._inference = Inference(bundle, job.settings, job.settings.num_threads_per_predictor)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Predict one fragment.

        Raises:
            SegrayError: The bundle cannot be used, or the model cannot run on this device.
            ClusterError: Processes die repeatedly on the fragment and no image explains it, or an unexpected exception
                was raised.
        """
        if self._error is not None:
            raise self._error
        watch = Stopwatch(time.process_time)
        if self._idle_since_s is not None:
            watch.add(Step.WAIT, time.perf_counter() - self._idle_since_s)
        decoded = batch.to_batches()[0]
        fragment = decoded["fragment"][0].as_py()
        with named_failure(f"predicting fragment {fragment}"):
            predicted = self._predict_fragment(fragment, decoded, watch)
        self._idle_since_s = time.perf_counter()
        return predicted

    def _predict_fragment(self, fragment: int, decoded: pa.RecordBatch, watch: Stopwatch) -> pa.Table:
        attempt_plan = self._ledger.begin(fragment)
        rows = decoded["rows"][0].as_py()
        usable = self._unpack(decoded, rows)
        if attempt_plan.one_by_one:
            self._predict_one_by_one(fragment, usable, attempt_plan, watch)
        else:
            self._predict(fragment, usable, watch)
        with watch.measure(Step.COUNT):
            for row in rows:
                row["status"] = "ok" if row["error_kind"] is None else "error"
            field = PREDICTED_SCHEMA.field("rows")
            columns = {"fragment": decoded["fragment"], "rows": pa.array([rows], field.type)}
        columns["steps"] = pa.array([decoded["steps"][0].as_py() + watch.to_rows()], STEPS_TYPE)
        predicted = pa.table(columns, schema=PREDICTED_SCHEMA)
        self._ledger.end(fragment, attempt_plan)
        return predicted

    def _unpack(self, decoded: pa.RecordBatch, rows: list[dict[str, Any]]) -> list[_UsableImage]:
        """Return the images of a row of ``DECODED_SCHEMA`` that have no error."""
        pixels = np.frombuffer(decoded["images"][0].as_buffer(), np.uint8).reshape(-1, *self._inference.image_size, 3)
        truths = [truth.as_buffer() if truth.is_valid else None for truth in decoded["truths"][0]]
        indices = [index for index, row in enumerate(rows) if row["error_kind"] is None]
        return [
            _UsableImage(index, rows[index], pixels[position], truths[position])
            for position, index in enumerate(indices)
        ]

    def _predict_one_by_one(
        self, fragment: int, images: Sequence[_UsableImage], attempt_plan: AttemptPlan, watch: Stopwatch
    ) -> None:
        """Predict one image after another, and record each in the ledger beforehand.

        Batches are padded to one fixed shape, so results have the same bits as in a full batch.
        """
        by_index = {image.index: image for image in images}

        def predict(index: int) -> dict[str, Any]:
            image = replace(by_index[index], row=dict(by_index[index].row))
            self._predict(fragment, [image], watch)
            return image.row

        ordered = attempt_plan.order_images(1 + max(by_index, default=-1))
        indices = [index for index in ordered if index in by_index]
        for index, row in self._ledger.process_one_by_one(fragment, attempt_plan, indices, predict).items():
            by_index[index].row |= row
        for index, failure in attempt_plan.failed.items():
            by_index[index].row |= {"error_kind": str(failure.kind), "error_message": failure.message, "note": None}

    def _predict(self, fragment: int, images: Sequence[_UsableImage], watch: Stopwatch) -> None:
        """Add the prediction's columns to the rows; the next batch is launched before one is finished."""
        in_flight: deque[tuple[Sequence[_UsableImage], Launched]] = deque()
        for start in range(0, len(images), self._batch_size):
            batch = images[start : start + self._batch_size]
            with self._named_and_limited(fragment, batch):
                sizes = [(image.row["height"], image.row["width"]) for image in batch]
                in_flight.append((batch, self._inference.launch([image.pixels for image in batch], sizes, watch)))
            if len(in_flight) > 1:
                self._finish(fragment, *in_flight.popleft(), watch)
        for batch, launched in in_flight:
            self._finish(fragment, batch, launched, watch)

    def _finish(self, fragment: int, batch: Sequence[_UsableImage], launched: Launched, watch: Stopwatch) -> None:
        with self._named_and_limited(fragment, batch):
            with watch.measure(Step.COUNT):
                truths = [self._decompress_truth(image) for image in batch]
            columns = self._inference.finish(launched, truths, watch)
            with watch.measure(Step.COUNT):
                for image, predicted in zip(batch, columns, strict=True):
                    image.row |= {**predicted, "mask": compress(predicted["mask"])}

    def _decompress_truth(self, image: _UsableImage) -> bytes | None:
        num_bytes = image.row["height"] * image.row["width"] * self._index_bytes
        return None if image.truth is None else decompress(image.truth, num_bytes)

    @contextmanager
    def _named_and_limited(self, fragment: int, batch: Sequence[_UsableImage]) -> Iterator[None]:
        """Limit the time of the block, and name its images in unexpected exceptions."""
        more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
        what = f"predicting {batch[0].row['uri']}{more} of fragment {fragment}"
        timeout_s = self._image_timeout_s * len(batch)
        with named_failure(what), self._exit_on_device_error(fragment), limited_time(timeout_s):
            yield

    @contextmanager
    def _exit_on_device_error(self, fragment: int | None = None) -> Iterator[None]:
        """End this process if its GPU fails in the block: the process that Ray starts instead may find it working.

        The ledger counts this as a death, so that it ends the run, or gives up an image, after a few of them.
        """
        try:
            yield
        except RuntimeError as error:
            from segray.segmentation.stages.inference import is_device_error

            if not is_device_error(error):
                raise
            if fragment is not None:
                self._ledger.report(fragment, flatten_message(error))
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
