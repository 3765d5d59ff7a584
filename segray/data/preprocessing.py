"""Pixels to model input: the same arithmetic in training, in evaluation and over a bucket."""

from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from segray.config import ModelConfig
from segray.errors import ConfigError, flatten_message

if TYPE_CHECKING:
    import torch  # 2 s, which those who only read a bundle's description need not wait for


class Preprocessing(BaseModel):
    """Normalisation of RGB values 0..255: ``(value - mean) / std`` for each channel. Travels in the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: tuple[float, float, float] = (255 * 0.485, 255 * 0.456, 255 * 0.406)  # of ImageNet
    std: tuple[float, float, float] = (255 * 0.229, 255 * 0.224, 255 * 0.225)

    @classmethod
    def of_encoder(cls, model: ModelConfig) -> Self:
        """Return what an encoder's pretrained weights were trained with; ImageNet's values without such weights.

        Raises:
            ConfigError: The weights expect something that segray does not feed (BGR).
        """
        if model.encoder_weights is None:
            return cls()
        import segmentation_models_pytorch as smp  # 3 s, which Ray's controller need not wait for

        try:
            params = smp.encoders.get_preprocessing_params(model.encoder_name, model.encoder_weights)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model.encoder_weights: cannot learn what {model.encoder_weights!r} of {model.encoder_name} expects: "
                f"{flatten_message(error)[:300]}; give this machine access to the model hub, or set null"
            ) from error
        if params["input_space"] != "RGB":
            raise ConfigError(
                f"model.encoder_weights: {model.encoder_weights} of {model.encoder_name} expects "
                f"{params['input_space']} images; choose other weights"
            )
        scale = 255 / params["input_range"][1]
        return cls(mean=tuple(scale * m for m in params["mean"]), std=tuple(scale * s for s in params["std"]))

    def apply(self, image_nhwc: "torch.Tensor") -> "torch.Tensor":
        """Normalise (N, H, W, 3) uint8 to (N, 3, H, W) float32, channels last in memory, on the tensor's device."""
        import torch

        # made here and copied without waiting, for a GPU may have much to do before that
        mean, std = (torch.tensor(v).to(image_nhwc.device, non_blocking=True) for v in (self.mean, self.std))
        return normalize(image_nhwc, mean, std)


def normalize(image_nhwc: "torch.Tensor", mean: "torch.Tensor", std: "torch.Tensor") -> "torch.Tensor":
    """Map (N, H, W, 3) uint8 to ``(value - mean) / std``, (N, 3, H, W) float32, channels last in memory."""
    return ((image_nhwc.float() - mean) / std).permute(0, 3, 1, 2)


def pad_batch(images: npt.NDArray[np.uint8], batch_size: int) -> npt.NDArray[np.uint8]:
    """Pad (n, H, W, 3) with black images to (batch_size, H, W, 3).

    A fixed batch shape keeps the arithmetic of an image the same whatever else is in its batch.
    """
    missing = batch_size - len(images)
    return np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
