"""Decodes the masks that are stored in the rows of a run."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def load_mask(row: Mapping[str, Any]) -> npt.NDArray[np.integer]:
    """Return the mask of an ``ok`` row, for either ``mask_encoding``.

    Args:
        row: The columns ``mask``, ``mask_encoding``, ``height`` and ``width``.

    Returns:
        (height, width) class indices, uint8, or uint16 above 256 classes. The array may be read-only.
    """
    indices: npt.NDArray[np.integer]
    if row["mask_encoding"] == "png":
        indices = np.asarray(Image.open(io.BytesIO(row["mask"]), formats=("PNG",)))
        return indices if indices.dtype == np.uint8 else indices.astype(np.uint16)
    num_pixels = row["height"] * row["width"]
    indices = np.frombuffer(row["mask"], np.uint8 if len(row["mask"]) == num_pixels else np.uint16)
    return indices.reshape(row["height"], row["width"])
