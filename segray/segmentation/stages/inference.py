"""A bundle's network on one device: batches of images to masks, statistics and counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from segray.config import SegmentSettings
from segray.data.preprocessing import pad_batch
from segray.errors import BundleError, ClusterError
from segray.metrics import compute_dice, compute_iou, count_from_confusion, to_nullable
from segray.models.bundle import load_bundle
from segray.models.confusion import compute_confusion
from segray.models.fuse_batchnorm import fold_norms
from segray.models.precision import autocast
from segray.models.prediction import Prediction, predict_image
from segray.runtime.connect import count_cores, get_last_line
from segray.segmentation.profile import Step, Stopwatch


@dataclass(frozen=True)
class Launched:
    """A batch under way.

    Attributes:
        predictions: Of each image, on the way to the processor's memory.
        arrived: Happens when all are there; None where they are already.
    """

    predictions: list[Prediction]
    arrived: torch.cuda.Event | None


class Inference:
    """The network of a bundle, ready to predict.

    A batch is launched, and finished later: on a GPU the next one is launched in between, so that it has something to
    do while results are brought into rows.

    Args:
        bundle_uri: The model.
        bundle_sha256: What the run was planned with; a bundle that was replaced since is refused.
        settings: ``batch_size``, ``precision`` and ``compile``; the GPU that Ray assigned is used if any was asked for.
        num_predictors_per_node: Predictors that share the cores of a node where there is no GPU.

    Attributes:
        image_size: Height and width of the model's input.

    Raises:
        BundleError: The bundle cannot be used, or is another one.
        ClusterError: The network cannot be compiled.
    """

    def __init__(
        self, bundle_uri: str, bundle_sha256: str, settings: SegmentSettings, num_predictors_per_node: int
    ) -> None:
        bundle = load_bundle(bundle_uri)
        if bundle.sha256 != bundle_sha256:
            raise BundleError(f"{bundle_uri}: replaced while the run was going on; restore it, or start another output")
        self._device = torch.device("cuda" if settings.num_gpus_per_predictor > 0 else "cpu")
        if self._device.type == "cpu":  # Ray gives an actor one thread
            torch.set_num_threads(max(1, count_cores() // num_predictors_per_node))
        self._batch_size = settings.batch_size
        self._precision = settings.precision
        self._classes = bundle.manifest.classes
        self.image_size = bundle.manifest.image_size
        self._preprocessing = bundle.manifest.preprocessing
        model = bundle.model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._model = fold_norms(model, self.image_size)
        self._run = self._apply
        if settings.compile:
            self._run = torch.compile(self._apply, dynamic=False)
            self._compile()

    def _apply(self, image_nhwc: torch.Tensor) -> torch.Tensor:
        logits_nchw: torch.Tensor = self._model(self._preprocessing.apply(image_nhwc))
        return logits_nchw

    @torch.inference_mode()
    def _compile(self) -> None:
        """Compile the network for the one shape that it is called with."""
        try:
            self._compute_logits([np.zeros((*self.image_size, 3), np.uint8)])
        except Exception as error:  # of the compilers that torch calls, or of torch's own; it begins with what is wrong
            wrong = (str(error) or type(error).__name__).splitlines()[0]
            raise ClusterError(
                f"the network cannot be compiled here: {wrong}; have a C++ compiler on every node, or set "
                "segment.compile: false"
            ) from error

    @torch.inference_mode()
    def launch(
        self, images: Sequence[npt.NDArray[np.uint8]], sizes: Sequence[tuple[int, int]], watch: Stopwatch
    ) -> Launched:
        """Begin with at most ``batch_size`` images; on a CPU they are predicted when this returns.

        Args:
            images: (h, w, 3) uint8 at the model's input size.
            sizes: Height and width of each mask.
            watch: Takes up the time.

        Raises:
            ClusterError: The GPU has too little memory.
        """
        try:
            with watch.measure(Step.PREDICT):
                logits_nchw = self._compute_logits(images)
            with watch.measure(Step.COUNT):
                predictions = [predict_image(*one) for one in zip(logits_nchw, sizes, strict=True)]
        except torch.OutOfMemoryError as error:
            raise ClusterError(
                f"the GPU has too little memory for {self._batch_size} images at a time: "
                f"{get_last_line(error)}; lower segment.batch_size"
            ) from error
        if self._device.type == "cpu":
            return Launched(predictions, None)
        fetched = [Prediction(*(part.to("cpu", non_blocking=True) for part in one)) for one in predictions]
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return Launched(fetched, arrived)

    def _compute_logits(self, images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Return the logits (n, C, h, w) of at most ``batch_size`` images; the pass has the same shape for any n."""
        padded = torch.from_numpy(pad_batch(np.stack(images), self._batch_size))
        if self._device.type == "cuda":  # only from pinned memory is a copy queued
            padded = padded.pin_memory()
        with autocast(self._device, self._precision):
            pixels = padded.to(self._device, non_blocking=True)
            return self._run(pixels)[: len(images)]

    def finish(self, launched: Launched, truths: Sequence[Any], watch: Stopwatch) -> list[dict[str, Any]]:
        """Return the columns of ``images`` that depend on a prediction, for each image of a batch.

        Args:
            launched: The batch.
            truths: Class-index map of each mask's size as a buffer of the class map's index type; None without truth.
            watch: Takes up the time.
        """
        with watch.measure(Step.COUNT):
            if launched.arrived is not None:
                launched.arrived.synchronize()
            return [self._describe(*one) for one in zip(launched.predictions, truths, strict=True)]

    def _describe(self, prediction: Prediction, truth: Any) -> dict[str, Any]:
        """Return the columns of one image that depend on its prediction."""
        classes = self._classes
        pixel_count = prediction.pixel_count.numpy()
        present = pixel_count > 0
        confidence = prediction.confidence_sum.numpy() / np.maximum(pixel_count, 1)
        entropy = prediction.entropy_sum.item() / prediction.mask.numel()
        columns: dict[str, Any] = {
            "mask": prediction.mask.numpy().astype(classes.mask_dtype, copy=False).tobytes(),
            "mask_encoding": "raw",
            "pixel_count": pixel_count.tolist(),
            "mean_confidence": to_nullable(np.where(present, confidence, np.nan)),
            "entropy": entropy if math.isfinite(entropy) else None,
        }
        if truth is None:
            return columns
        size = prediction.mask.shape
        truth_hw = torch.from_numpy(np.frombuffer(truth, classes.index_dtype).reshape(size).copy())
        confusion = compute_confusion(truth_hw, prediction.mask, classes.num_classes, classes.ignore_index)
        counts = count_from_confusion(confusion.numpy())
        scores = {"iou": to_nullable(compute_iou(counts)), "dice": to_nullable(compute_dice(counts))}
        return {**columns, **{name: value.tolist() for name, value in counts._asdict().items()}, **scores}
