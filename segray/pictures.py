"""Pictures for people: masks over images, training curves, scores of classes. All are returned as PNG files."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from segray.classes import ClassMap, build_palette

_MAX_LEGEND_CLASSES = 24
_MAX_CURVE_CLASSES = 12
_IGNORED_COLOUR = (255, 255, 255)


class Panel(NamedTuple):
    """One image of a comparison.

    Attributes:
        title: Written above it.
        image: (H, W, 3) uint8.
        truth: (H, W) class indices, or None without ground truth.
        mask: (H, W) predicted class indices.
    """

    title: str
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.integer] | None
    mask: npt.NDArray[np.integer]


def colour_mask(mask: npt.NDArray[np.integer], classes: ClassMap) -> npt.NDArray[np.uint8]:
    """Return (H, W, 3) uint8 RGB: each class in its palette colour, ignored pixels white."""
    colours = np.vstack([build_palette(classes.num_classes), [_IGNORED_COLOUR]]).astype(np.uint8)
    return colours[np.where(mask == classes.ignore_index, classes.num_classes, mask)]


def draw_comparison(panels: Sequence[Panel], classes: ClassMap) -> bytes:
    """Draw image, truth (where there is one) and prediction side by side, a row for each panel, with a legend."""
    has_truth = any(panel.truth is not None for panel in panels)
    names = ["image", "truth", "prediction"] if has_truth else ["image", "prediction"]
    height, width = panels[0].image.shape[:2]
    cell_width_in = 3.0
    cell_height_in = cell_width_in * height / width + 0.25
    figure = Figure(figsize=(cell_width_in * len(names), cell_height_in * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), len(names), squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        masks = [panel.truth, panel.mask] if has_truth else [panel.mask]
        row[0].imshow(panel.image)
        for axis, mask in zip(row[1:], masks, strict=True):
            if mask is not None:
                axis.imshow(colour_mask(mask, classes), interpolation="nearest")
        for axis, name in zip(row, names, strict=True):
            axis.set_axis_off()
            axis.set_title(panel.title if name == "image" else name, fontsize=8)
    shown = list(zip(classes.names, build_palette(classes.num_classes), strict=True))[:_MAX_LEGEND_CLASSES]
    patches = [Patch(facecolor=tuple(colour / 255), edgecolor="black", label=name) for name, colour in shown]
    if has_truth and classes.ignore_values:
        patches.append(Patch(facecolor="white", edgecolor="black", label="not scored"))
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(patches)), fontsize=8)
    return _save(figure)


def draw_curves(history: Sequence[dict[str, Any]], classes: ClassMap) -> bytes:
    """Draw loss, learning rate, mean scores and per-class IoU over epochs."""
    epochs = [metrics["epoch"] for metrics in history]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, rate), (means, ious) = figure.subplots(2, 2)
    loss.plot(epochs, [metrics["loss"] for metrics in history], marker=".")
    loss.set(title="training loss (mean over pixels)", ylim=(0, None))
    rate.plot(epochs, [metrics["learning_rate"] for metrics in history], marker=".")
    rate.set(title="learning rate", ylim=(0, None))
    for name, label in (("val_mean_iou", "mean IoU"), ("val_mean_dice", "mean Dice")):
        means.plot(epochs, [metrics[name] for metrics in history], marker=".", label=label)
    means.set(title="validation, mean over classes", ylim=(0, 1))
    means.legend(fontsize=8)
    colours = build_palette(classes.num_classes) / 255
    for index, name in enumerate(classes.names[:_MAX_CURVE_CLASSES]):
        values = [np.nan if metrics["val_iou"][index] is None else metrics["val_iou"][index] for metrics in history]
        ious.plot(epochs, values, marker=".", label=name, color=colours[index])
    ious.set(title="validation IoU of each class", ylim=(0, 1))
    ious.legend(fontsize=7, ncols=2)
    for axis in (loss, rate, means, ious):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    return _save(figure)


def draw_class_bars(values: Sequence[float | None], classes: ClassMap, title: str) -> bytes:
    """Draw one horizontal bar for each class; none for a class whose value is undefined."""
    figure = Figure(figsize=(6, 0.8 + 0.28 * classes.num_classes), layout="constrained")
    axis = figure.subplots()
    widths = [0.0 if value is None else value for value in values]
    axis.barh(classes.names, widths, color=build_palette(classes.num_classes) / 255, edgecolor="black", linewidth=0.5)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    return _save(figure)


def _save(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
