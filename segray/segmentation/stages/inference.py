"""Runs the model of a bundle on one device: batches of images to masks, statistics and confusion counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from segray.config import SegmentSettings
from segray.data.preprocessing import pad_batch
from segray.errors import ClusterError
from segray.metrics import compute_dice, compute_iou, count_from_confusion, to_nullable
from segray.models.bundle import Bundle
from segray.models.confusion import compute_confusion
from segray.models.fuse_batchnorm import fold_norms
from segray.models.precision import autocast
from segray.models.prediction import ImagePrediction, predict_image
from segray.runtime.failures import get_last_line
from segray.segmentation.profile import Step, Stopwatch


@dataclass(frozen=True)
class Launched:
    """A batch whose results are being computed.

    Attributes:
        predictions: Predictions of the images, in CPU memory.
        copied: Event after which their values are valid; None if they are valid already (on a CPU).
    """

    predictions: list[ImagePrediction]
    copied: torch.cuda.Event | None


def is_device_error(error: BaseException) -> bool:
    """Return whether an error leaves the GPU unusable for this process, unlike a lack of memory."""
    texts = ("CUDA error", "cuDNN error")
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


class Inference:
    """The model of a bundle, loaded on a device.

    ``launch`` starts a batch and ``finish`` returns its results. On a GPU the next batch is launched in between, so the
    GPU stays busy while the CPU turns results into rows.

    Args:
        bundle: The model bundle; the model is moved to the device.
        settings: ``batch_size``, ``precision``, ``compile`` and ``num_gpus_per_predictor``: above 0, the GPU that Ray
            assigned is used.
        num_threads: Threads of the CPU; None leaves their number as it is. Another number may change the last bits.

    Attributes:
        image_size: Height and width of the model's input.

    Raises:
        ClusterError: The model cannot be compiled.
    """

    def __init__(self, bundle: Bundle, settings: SegmentSettings, num_threads: int | None = None) -> None:
        self._device = torch.device("cuda" if settings.num_gpus_per_predictor > 0 else "cpu")
        if self._device.type == "cpu" and num_threads is not None:
            torch.set_num_threads(num_threads)
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
        """Compile the model for the only input shape that it is called with."""
        try:
            self.compute_logits([np.zeros((*self.image_size, 3), np.uint8)])
        except Exception as error:  # Torch and its compilers raise many types; the first line is the cause.
            cause = (str(error) or type(error).__name__).splitlines()[0]
            raise ClusterError(
                f"cannot compile the model on this node: {cause}; install a C++ compiler on every node, or set "
                "segment.compile: false"
            ) from error

    @torch.inference_mode()
    def launch(
        self, images: Sequence[npt.NDArray[np.uint8]], sizes: Sequence[tuple[int, int]], watch: Stopwatch
    ) -> Launched:
        """Start the prediction of at most ``batch_size`` images; on a CPU it is complete on return.

        Args:
            images: (h, w, 3) uint8 at the model's input size.
            sizes: Height and width of each mask.
            watch: Receives the time spent.

        Raises:
            ClusterError: The GPU does not have enough memory.
        """
        try:
            with watch.measure(Step.PREDICT):
                logits_nchw = self.compute_logits(images)
            with watch.measure(Step.COUNT):
                predictions = [predict_image(*one) for one in zip(logits_nchw, sizes, strict=True)]
        except torch.OutOfMemoryError as error:
            raise ClusterError(
                f"not enough GPU memory for batches of {self._batch_size} images: {get_last_line(error)}; lower "
                "segment.batch_size (an output that has rows already needs segment.allow_mixed: true as well)"
            ) from error
        if self._device.type == "cpu":
            return Launched(predictions, None)
        on_cpu = [ImagePrediction(*(part.to("cpu", non_blocking=True) for part in one)) for one in predictions]
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return Launched(on_cpu, copied)

    @torch.inference_mode()
    def compute_logits(self, images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Return the logits (n, C, h, w) of n images; the batch is padded, so that its shape is the same for any n."""
        padded = torch.from_numpy(pad_batch(np.stack(images), self._batch_size))
        if self._device.type == "cuda":  # Only copies from pinned memory are asynchronous.
            padded = padded.pin_memory()
        with autocast(self._device, self._precision):
            pixels = padded.to(self._device, non_blocking=True)
            return self._run(pixels)[: len(images)]

    def finish(self, launched: Launched, truths: Sequence[Any], watch: Stopwatch) -> list[dict[str, Any]]:
        """Return the columns of ``IMAGES_SCHEMA`` that depend on the prediction, for each image of a batch.

        Args:
            launched: The batch.
            truths: Class-index map of each image at its own size, as a buffer of the class map's ``index_dtype``; None
                without ground truth.
            watch: Receives the time spent.
        """
        with watch.measure(Step.COUNT):
            if launched.copied is not None:
                launched.copied.synchronize()
            return [self._build_columns(*one) for one in zip(launched.predictions, truths, strict=True)]

    def _build_columns(self, prediction: ImagePrediction, truth: Any) -> dict[str, Any]:
        """Return the columns of one image that depend on its prediction: mask, statistics, and scores if any."""
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
