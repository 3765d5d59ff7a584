"""Load a bundle in this process to predict single images."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from segray.config import SegmentSettings
from segray.data.images import resize_image
from segray.errors import DataError
from segray.models.bundle import BundleManifest, load_bundle
from segray.models.prediction import compute_confidence, predict_image
from segray.segmentation.stages.inference import Inference


class Prediction(NamedTuple):
    """Prediction for one image, at the image's own size.

    Attributes:
        mask: (H, W) class indices, uint8, or uint16 above 256 classes.
        confidence: (H, W) float32, softmax probability of the predicted class.
    """

    mask: npt.NDArray[np.integer]
    confidence: npt.NDArray[np.float32]


class BundleModel:
    """The model of a bundle, loaded on a device in this process.

    Attributes:
        manifest: Content of ``bundle.json``: classes, image size, scores, training settings.
    """

    def __init__(self, bundle_uri: str, settings: SegmentSettings) -> None:
        """Load a bundle.

        Raises:
            BundleError: The bundle is missing, damaged or incompatible.
        """
        bundle = load_bundle(bundle_uri)
        self.manifest: BundleManifest = bundle.manifest
        self._inference = Inference(bundle, settings)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the indices in masks."""
        return self.manifest.class_names

    @torch.inference_mode()
    def predict(self, image: npt.NDArray[np.uint8]) -> Prediction:
        """Predict one image with the operations of ``segray.segment``, which gives the same mask.

        On CPUs its threads are those of torch in this process; another number may change the last bits of the logits,
        and so a pixel at which two classes are equal up to these bits.

        Args:
            image: (H, W, 3) uint8 RGB, such as ``np.asarray(PIL.Image.open(path).convert("RGB"))``. ``segray.segment``
                also applies EXIF orientation while decoding (``PIL.ImageOps.exif_transpose``).

        Raises:
            DataError: The image has another shape or dtype.
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise DataError(
                f"expected an image of shape (height, width, 3) and dtype uint8, got {image.shape} and {image.dtype}; "
                "convert it to 8-bit RGB"
            )
        size = (image.shape[0], image.shape[1])
        (logits_chw,) = self._inference.compute_logits([resize_image(image, self._inference.image_size)])
        mask = predict_image(logits_chw, size).mask.cpu().numpy()
        confidence = compute_confidence(logits_chw, size).cpu().numpy()
        return Prediction(mask.astype(self.manifest.classes.mask_dtype, copy=False), confidence)
