"""The network that all compared implementations use, smp's U-Net with a bundle's weights, and the rows they write."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

BATCH_SIZE = 8


class Model:
    """A U-Net of smp, from images to masks.

    Args:
        bundle: A bundle folder, of which only the weights and the values of ``bundle.json`` are used.
        precision: ``fp32``, or ``bf16`` for autocast and channels-last.
    """

    def __init__(self, bundle: str, precision: str) -> None:
        manifest = json.loads(Path(bundle, "bundle.json").read_text())
        weights = load_file(Path(bundle, "model.safetensors"))
        network = smp.Unet(
            manifest["model"]["encoder_name"], encoder_weights=None, classes=len(manifest["class_names"])
        )
        network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in weights.items()})
        self.size: tuple[int, int] = tuple(manifest["image_size"])
        self.num_classes = len(manifest["class_names"])
        self._is_bf16 = precision == "bf16"
        self._network = network.eval()
        if self._is_bf16:
            self._network = self._network.to(memory_format=torch.channels_last)
        self._mean = torch.tensor(manifest["preprocessing"]["mean"])[:, None, None]
        self._std = torch.tensor(manifest["preprocessing"]["std"])[:, None, None]

    def read(self, path: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return a normalised image (3, h, w) float32 at the model's size, and its own size (H, W)."""
        return self.decode(Path(path).read_bytes())

    def decode(self, content: bytes) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the same as ``read`` for the bytes of a file."""
        image = Image.open(io.BytesIO(content)).convert("RGB")
        pixels = np.array(image.resize(self.size[::-1], Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).float()
        return (tensor - self._mean) / self._std, (image.height, image.width)

    @torch.inference_mode()
    def predict(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> list[npt.NDArray[np.uint8]]:
        """Return a mask (H, W) uint8 at each image's own size."""
        if self._is_bf16:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._is_bf16):
            logits = self._network(images)
        return [
            functional.interpolate(one[None].float(), size, mode="bilinear")[0].argmax(0).to(torch.uint8).numpy()
            for one, size in zip(logits, sizes, strict=True)
        ]

    def describe(self, uri: str, mask: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """Return the row of an image; all compared implementations write the same columns."""
        return {
            "uri": uri,
            "height": mask.shape[0],
            "width": mask.shape[1],
            "mask": mask.tobytes(),
            "pixel_count": np.bincount(mask.ravel(), minlength=self.num_classes).tolist(),
        }
