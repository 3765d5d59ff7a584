"""Convert pixels to model input, with the same arithmetic in training, evaluation and segmentation."""

from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from segray.config import ModelConfig
from segray.errors import ConfigError, flatten_message

if TYPE_CHECKING:
    import torch  # Importing torch takes 2 s, and reading the description of a bundle does not need it.


class Preprocessing(BaseModel):
    """Normalisation of RGB values 0..255: ``(value - mean) / std`` for each channel. It is stored in the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: tuple[float, float, float] = (255 * 0.485, 255 * 0.456, 255 * 0.406)  # ImageNet, scaled to 0..255.
    std: tuple[float, float, float] = (255 * 0.229, 255 * 0.224, 255 * 0.225)

    @classmethod
    def of_encoder(cls, model: ModelConfig) -> Self:
        """Return the normalisation that an encoder's pretrained weights expect, or ImageNet's if there are none.

        Raises:
            ConfigError: The weights expect BGR images, or what they expect cannot be looked up.
        """
        if model.encoder_weights is None:
            return cls()
        import segmentation_models_pytorch as smp  # Importing smp takes 3 s, and Ray's controller does not need it.

        try:
            params = smp.encoders.get_preprocessing_params(model.encoder_name, model.encoder_weights)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model.encoder_weights: cannot look up what {model.encoder_weights!r} of {model.encoder_name} "
                f"expects: {flatten_message(error)[:300]}; give this machine access to the model hub, or set null"
            ) from error
        if params["input_space"] != "RGB":
            raise ConfigError(
                f"model.encoder_weights: {model.encoder_weights} of {model.encoder_name} expects "
                f"{params['input_space']} images; choose other weights"
            )
        scale = 255 / params["input_range"][1]
        return cls(mean=tuple(scale * m for m in params["mean"]), std=tuple(scale * s for s in params["std"]))

    def apply(self, image_nhwc: "torch.Tensor") -> "torch.Tensor":
        """Normalise (N, H, W, 3) uint8 to (N, 3, H, W) float32 in channels-last memory order, on the same device."""
        import torch

        # The constants are copied asynchronously, so that the host does not wait for work queued on the GPU.
        mean, std = (torch.tensor(v).to(image_nhwc.device, non_blocking=True) for v in (self.mean, self.std))
        return normalize(image_nhwc, mean, std)


def normalize(image_nhwc: "torch.Tensor", mean: "torch.Tensor", std: "torch.Tensor") -> "torch.Tensor":
    """Return ``(value - mean) / std`` of (N, H, W, 3) uint8 as (N, 3, H, W) float32 in channels-last memory order."""
    return ((image_nhwc.float() - mean) / std).permute(0, 3, 1, 2)


def pad_batch(images: npt.NDArray[np.uint8], batch_size: int) -> npt.NDArray[np.uint8]:
    """Append black images to (n, H, W, 3) until the shape is (batch_size, H, W, 3).

    With a fixed batch shape, the result for an image does not depend on the number of images in its batch.
    """
    missing = batch_size - len(images)
    return np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
