"""GPU (or CPU) stage: holds the model, and maps decoded fragments to finished rows with raw masks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from segray.bundle import load_bundle
from segray.cluster import count_cores, get_last_line
from segray.config import SegmentSettings
from segray.errors import BundleError, ClusterError, FaultKind, SegrayError
from segray.metrics import compute_dice, compute_iou, count_from_confusion, to_nullable
from segray.models.counts import compute_confusion
from segray.models.folding import fold_norms
from segray.models.precision import autocast
from segray.models.prediction import predict_image
from segray.schema import IMAGES_SCHEMA
from segray.segment.ledger import MAX_DEATHS_PER_IMAGE, LedgerClient, Orders
from segray.segment.profile import STEPS_TYPE, Step, Stopwatch
from segray.transforms import pad_batch

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
        settings: ``batch_size`` and ``precision``; the GPU that Ray assigned is used if any was asked for.
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
        self._error: SegrayError | None = None
        self._idle_since_s: float | None = None
        try:
            ledger.start_predictor()
            self._set_up(bundle_uri, bundle_sha256, settings, num_predictors_per_node)
        except SegrayError as error:  # raised with the first fragment: of a constructor's error Ray keeps only the text
            self._error = error

    def _set_up(
        self, bundle_uri: str, bundle_sha256: str, settings: SegmentSettings, num_predictors_per_node: int
    ) -> None:
        bundle = load_bundle(bundle_uri)
        if bundle.sha256 != bundle_sha256:
            raise BundleError(f"{bundle_uri}: replaced while the run was going on; restore it, or start another output")
        self._device = torch.device("cuda" if settings.num_gpus_per_predictor > 0 else "cpu")
        if self._device.type == "cpu":  # Ray gives an actor one thread
            torch.set_num_threads(max(1, count_cores() // num_predictors_per_node))
        self._settings = settings
        self._classes = bundle.manifest.classes
        self._preprocessing = bundle.manifest.preprocessing
        self._image_size = bundle.manifest.image_size
        model = fold_norms(bundle.model, self._image_size)
        self._model = model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

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
        pixels = np.frombuffer(decoded["images"][0].as_buffer(), np.uint8).reshape(-1, *self._image_size, 3)
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
        """Add to the rows what depends on the prediction."""
        size = self._settings.batch_size
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            with watch.measure(Step.PREDICT):
                logits_nchw = self._compute_logits(batch)
            with watch.measure(Step.COUNT):  # of a GPU's model too, for here its results are waited for
                for image, logits_chw in zip(batch, logits_nchw, strict=True):
                    image.row |= self._finish(logits_chw, (image.row["height"], image.row["width"]), image.truth)

    def _compute_logits(self, images: Sequence[_Usable]) -> torch.Tensor:
        """Return the logits (n, C, h, w) of at most ``batch_size`` images; the pass has the same shape for any n."""
        padded = torch.from_numpy(pad_batch(np.stack([image.pixels for image in images]), self._settings.batch_size))
        try:
            with torch.inference_mode(), autocast(self._device, self._settings.precision):
                logits_nchw: torch.Tensor = self._model(self._preprocessing.apply(padded.to(self._device)))
        except torch.OutOfMemoryError as error:
            raise ClusterError(
                f"the GPU has too little memory for {self._settings.batch_size} images at a time: "
                f"{get_last_line(error)}; lower segment.batch_size"
            ) from error
        return logits_nchw[: len(images)]

    @torch.inference_mode()
    def _finish(self, logits_chw: torch.Tensor, size: tuple[int, int], truth: pa.Buffer | None) -> dict[str, Any]:
        """Return the columns of one image that depend on its prediction."""
        prediction = predict_image(logits_chw, size)
        pixel_count = prediction.pixel_count.cpu().numpy()
        present = pixel_count > 0
        confidence = prediction.confidence_sum.cpu().numpy() / np.maximum(pixel_count, 1)
        columns: dict[str, Any] = {
            "mask": prediction.mask.cpu().numpy().astype(self._classes.mask_dtype).tobytes(),
            "mask_encoding": "raw",
            "pixel_count": pixel_count.tolist(),
            "mean_confidence": to_nullable(np.where(present, confidence, np.nan)),
            "entropy": prediction.entropy_sum.item() / (size[0] * size[1]),
        }
        if truth is None:
            return columns
        truth_hw = torch.from_numpy(np.frombuffer(truth, self._classes.index_dtype).reshape(size).copy())
        classes = self._classes
        confusion = compute_confusion(
            truth_hw.to(self._device), prediction.mask, classes.num_classes, classes.ignore_index
        )
        counts = count_from_confusion(confusion.cpu().numpy())
        scores = {"iou": to_nullable(compute_iou(counts)), "dice": to_nullable(compute_dice(counts))}
        return {**columns, **{name: value.tolist() for name, value in counts._asdict().items()}, **scores}
