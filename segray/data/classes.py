"""Classes: their names, the raw values that stand for them in mask files, and the colours that show them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segray.errors import FaultKind, ImageFault

_UNDECLARED = -1
_VOID = 255  # by custom, as in PASCAL VOC and Cityscapes
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
            found = np.unique(raw[undeclared])
            message = f"mask value{'s' if len(found) > 1 else ''} {_list_some(found.tolist())} not declared"
            remedy = self.suggest_declaration(np.unique(raw).tolist())
            raise ImageFault(FaultKind.MASK_MISMATCH, f"{message} ({int(undeclared.sum())} pixels)", remedy)
        encoded: npt.NDArray[np.integer] = indices.astype(self.index_dtype)
        return encoded

    def suggest_declaration(self, present: Collection[int]) -> str:
        """Return how to declare the values that masks hold, at least one of which is not declared.

        Args:
            present: All values of the masks, of as many as there are: one mask may hold few of its data set's.
        """
        n, declared = self.num_classes, set(self.values)
        labels = set(present) - set(self.ignore_values)
        ignored = list(self.ignore_values)
        if n == 2 and labels == {0, _VOID}:
            return f"a 0/{_VOID} mask: set data.class_values: [0, {_VOID}]"
        without_void = labels
        if _VOID not in declared and _VOID in labels:
            without_void = labels - {_VOID}
            ignored.append(_VOID)
        and_ignored = f" and data.ignore_values: {ignored}" if without_void != labels else ""
        undeclared = without_void - declared
        if not undeclared:
            return f"{_VOID} is mostly void: set data.ignore_values: {ignored}"
        if undeclared == {n} and declared == set(range(n)):
            from_one = f"data.class_values: {_format_values(range(1, n + 1))}"
            if 0 not in labels:
                return f"values start at 1: set {from_one}{and_ignored}"
            return (
                f"one value more than classes: if {n} is void, set data.ignore_values: {[*ignored, n]}; "
                f"if 0 is, set {from_one} and data.ignore_values: {[*ignored, 0]}"
            )
        for found, also in ((labels, ""), (without_void, and_ignored)):
            if len(found) == n:
                return f"as many values as classes: set data.class_values: {_format_values(sorted(found))}{also}"
        listed = _list_some(sorted(labels - declared))
        return f"expected {_list_some(self.values)}: add {listed} to data.class_values or data.ignore_values"


def _format_values(values: Sequence[int]) -> str:
    """Return values as a setting has them; the middle of a long run is left out."""
    is_long_run = len(values) > _MAX_LISTED_VALUES and values[-1] - values[0] == len(values) - 1
    return f"[{values[0]}, {values[1]}, …, {values[-1]}]" if is_long_run else str(list(values))


def _list_some(values: Sequence[int]) -> str:
    if len(values) > 2 and tuple(values) == tuple(range(values[0], values[0] + len(values))):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:_MAX_LISTED_VALUES])) + (", …" if len(values) > _MAX_LISTED_VALUES else "")


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
