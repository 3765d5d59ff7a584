"""Helpers that save small bundles and compare masks, from any device and precision, with logits from the CPU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from segray.config import ModelConfig
from segray.data.preprocessing import Preprocessing
from segray.models.bundle import BundleDescription, load_bundle, save_bundle
from tests.conftest import PET_CLASSES

# A pixel is clear if its two highest logits differ by more than this share of the image's largest one. fp32 is not
# exact on a GPU: cuDNN convolves in TF32, which has 10 bits of mantissa; bf16 has 7.
MARGINS = {"fp32": 0.02, "bf16": 0.1}


def save_square_bundle(folder: Path, weights: dict[str, torch.Tensor], model: ModelConfig, side: int) -> None:
    """Write a bundle whose model input is square."""
    save_bundle(str(folder), weights, BundleDescription(model, PET_CLASSES, (side, side), Preprocessing()))


def compute_logits(bundle: Path, images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """Return the logits (N, C, h, w) of images of the model's input size: on the CPU, in float32, without folding."""
    loaded = load_bundle(str(bundle))
    with torch.inference_mode():
        logits_nchw: torch.Tensor = loaded.model(
            loaded.manifest.preprocessing.apply(torch.from_numpy(np.stack(images)))
        )
    return logits_nchw


def assert_same_where_clear(mask: npt.NDArray[np.integer], logits_chw: torch.Tensor, precision: str) -> None:
    """Assert that a mask (H, W) equals the argmax of the resized logits at clear pixels, which must be the majority."""
    size = (mask.shape[0], mask.shape[1])
    resized = functional.interpolate(logits_chw[None], size=size, mode="bilinear", align_corners=False)[0]
    highest = resized.topk(2, dim=0).values
    is_clear = (highest[0] - highest[1] > MARGINS[precision] * resized.abs().max()).numpy()
    assert is_clear.mean() > 0.5, "too few clear pixels to compare"
    np.testing.assert_array_equal(mask[is_clear], resized.argmax(0).numpy()[is_clear])
