"""Classes: their names, the raw values that stand for them in mask files, and the colours that show them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segray.errors import FaultKind, ImageFault

_UNDECLARED = -1
_MAX_LISTED_VALUES = 8


@dataclass(frozen=True)
class ClassMap:
    """The classes of a data set.

    A *class-index map* is an (H, W) array of ``index_dtype`` holding 0..num_classes-1, and ``ignore_index`` where the
    truth is neither scored nor learned from.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignore_values: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, the ignored pixels not counted."""
        return len(self.names)

    @property
    def ignore_index(self) -> int:
        """Value of ignored pixels in class-index maps: 255, or 65535 where 255 is a class."""
        return 255 if self.num_classes <= 255 else 65_535

    @property
    def index_dtype(self) -> npt.DTypeLike:
        """Dtype of class-index maps with ignored pixels: uint8 up to 255 classes, else uint16."""
        return np.uint8 if self.num_classes <= 255 else np.uint16

    @property
    def mask_dtype(self) -> npt.DTypeLike:
        """Dtype of predicted masks, which hold no ignored pixels: uint8 up to 256 classes, else uint16."""
        return np.uint8 if self.num_classes <= 256 else np.uint16

    def encode(self, raw: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Turn raw mask values (H, W) into class indices (H, W) of ``index_dtype``.

        Raises:
            ImageFault: ``mask_mismatch``: the mask holds values that no class and no ignore value declares.
        """
        lookup = np.full(65_536, _UNDECLARED, np.int32)
        lookup[list(self.values)] = np.arange(self.num_classes)
        lookup[list(self.ignore_values)] = self.ignore_index
        indices = lookup[raw]
        undeclared = indices == _UNDECLARED
        if undeclared.any():
            raise ImageFault(FaultKind.MASK_MISMATCH, self._describe_undeclared(raw, undeclared))
        encoded: npt.NDArray[np.integer] = indices.astype(self.index_dtype)
        return encoded

    def _describe_undeclared(self, raw: npt.NDArray[np.integer], undeclared: npt.NDArray[np.bool_]) -> str:
        found = np.unique(raw[undeclared])
        present = set(np.unique(raw).tolist())
        listed = ", ".join(str(v) for v in found[:_MAX_LISTED_VALUES]) + (
            ", …" if len(found) > _MAX_LISTED_VALUES else ""
        )
        message = f"mask value{'s' if len(found) > 1 else ''} {listed} not declared ({int(undeclared.sum())} pixels)"
        n = self.num_classes
        if present == {0, 255} and n == 2:
            return f"{message}; a 0/255 mask: set data.class_values: [0, 255]"
        if self.values == tuple(range(n)) and present <= set(range(1, n + 1)):
            return f"{message}; values start at 1: set data.class_values: {list(range(1, n + 1))}"
        return f"{message}; expected {_list_some(self.values)}: add them to data.class_values or data.ignore_values"


def _list_some(values: Sequence[int]) -> str:
    if len(values) > 2 and tuple(values) == tuple(range(values[0], values[0] + len(values))):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values)


def build_palette(num_classes: int) -> npt.NDArray[np.uint8]:
    """Return (num_classes, 3) uint8 RGB colours: the PASCAL VOC colour map without its black first entry.

    Source: bit interleaving of the VOC development kit's ``VOClabelcolormap.m``.
    """
    palette = np.zeros((num_classes, 3), np.uint8)
    for index in range(num_classes):
        bits = index + 1
        for shift in range(7, -1, -1):
            for channel in range(3):
                palette[index, channel] |= ((bits >> channel) & 1) << shift
            bits >>= 3
    return palette
