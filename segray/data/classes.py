"""Classes: their names, their raw values in mask files, and their colours in pictures."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segray.errors import FaultKind, ImageFault

_UNDECLARED = -1
_VOID = 255  # By convention, as in PASCAL VOC and Cityscapes.
_MAX_LISTED_VALUES = 8
_MAX_YAML_VALUES = 40


@dataclass(frozen=True)
class ClassMap:
    """The classes of a data set, and the conversion of raw mask values to class indices.

    A *class-index map* is an (H, W) array of ``index_dtype`` with values 0..num_classes-1, and ``ignore_index`` for
    pixels that are neither trained on nor scored.

    Attributes:
        names: Name of each class.
        values: Raw mask value of each class, 0..65535.
        ignore_values: Raw mask values, 0..65535, of ignored pixels.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignore_values: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes; ignored pixels are not a class."""
        return len(self.names)

    @property
    def ignore_index(self) -> int:
        """Value of ignored pixels in class-index maps: 255, or 65535 if there are more than 255 classes."""
        return 255 if self.num_classes <= 255 else 65_535

    @property
    def index_dtype(self) -> npt.DTypeLike:
        """Dtype of class-index maps that may hold ignored pixels: uint8 up to 255 classes, else uint16."""
        return np.uint8 if self.num_classes <= 255 else np.uint16

    @property
    def mask_dtype(self) -> npt.DTypeLike:
        """Dtype of predicted masks, which have no ignored pixels: uint8 up to 256 classes, else uint16."""
        return np.uint8 if self.num_classes <= 256 else np.uint16

    def encode(self, raw: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Convert raw mask values, (H, W) integers 0..65535, to a class-index map, (H, W) of ``index_dtype``.

        Raises:
            ImageFault: ``mask_mismatch``, if a value is in neither ``values`` nor ``ignore_values``.
        """
        lookup = np.full(65_536, _UNDECLARED, np.int32)
        lookup[list(self.values)] = np.arange(self.num_classes)
        lookup[list(self.ignore_values)] = self.ignore_index
        indices = lookup.take(raw)
        undeclared = indices == _UNDECLARED
        if undeclared.any():
            found = np.unique(raw[undeclared])
            subject, verb = ("values", "are") if len(found) > 1 else ("value", "is")
            message = f"mask {subject} {_list_some(found.tolist())} {verb} not declared"
            remedy = self.suggest_declaration(np.unique(raw).tolist())
            raise ImageFault(FaultKind.MASK_MISMATCH, f"{message} ({int(undeclared.sum())} pixels)", remedy)
        encoded: npt.NDArray[np.integer] = indices.astype(self.index_dtype)
        return encoded

    def suggest_declaration(self, present: Collection[int]) -> str:
        """Return a sentence that says which settings would declare the values found in masks.

        Args:
            present: Raw values found in masks, at least one of them undeclared. Pass the values of all masks if they
                are known: a single mask may hold only a few values of its data set.
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
            return f"{_VOID} usually means void: set data.ignore_values: {ignored}"
        if undeclared == {n} and declared == set(range(n)):
            from_one = f"data.class_values: {_format_values(range(1, n + 1))}"
            if 0 not in labels:
                return f"values start at 1: set {from_one}{and_ignored}"
            return (
                f"the masks hold one value more than there are classes: if {n} is void, set "
                f"data.ignore_values: {[*ignored, n]}; if 0 is void, set {from_one} and "
                f"data.ignore_values: {[*ignored, 0]}"
            )
        for found, also in ((labels, ""), (without_void, and_ignored)):
            if len(found) == n:
                return (
                    "the masks hold as many values as there are classes: set data.class_values: "
                    f"{_format_values(sorted(found))}{also}"
                )
        listed = _list_some(sorted(labels - declared))
        return f"expected {_list_some(self.values)}: add {listed} to data.class_values or data.ignore_values"


def _format_values(values: Sequence[int]) -> str:
    """Return values as a YAML list; the middle of a long one is abbreviated, so that an error row stays short."""
    is_run = values[-1] - values[0] == len(values) - 1
    if len(values) > (_MAX_LISTED_VALUES if is_run else _MAX_YAML_VALUES):
        return f"[{values[0]}, {values[1]}, …, {values[-1]}]"
    return str(list(values))


def _list_some(values: Sequence[int]) -> str:
    """Return values as text: a consecutive run as a range, others up to a maximum number."""
    if len(values) > 2 and tuple(values) == tuple(range(values[0], values[0] + len(values))):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:_MAX_LISTED_VALUES])) + (", …" if len(values) > _MAX_LISTED_VALUES else "")


def build_palette(num_classes: int) -> npt.NDArray[np.uint8]:
    """Return (num_classes, 3) uint8 RGB colours: the PASCAL VOC colour map without its first entry, black.

    Source: the bit interleaving of ``VOClabelcolormap.m`` in the VOC development kit.
    """
    palette = np.zeros((num_classes, 3), np.uint8)
    for index in range(num_classes):
        bits = index + 1
        for shift in range(7, -1, -1):
            for channel in range(3):
                palette[index, channel] |= ((bits >> channel) & 1) << shift
            bits >>= 3
    return palette
