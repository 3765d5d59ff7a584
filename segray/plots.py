"""Draw PNG files for people to look at: masks over images, training curves, confusion matrices, scores per class."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from segray.data.classes import ClassMap, build_palette
from segray.metrics import IntArray, divide

_MAX_LEGEND_CLASSES = 24
_MAX_CURVE_CLASSES = 12
_MAX_NUMBERED_CLASSES = 24  # A confusion matrix of more classes has no space for numbers.
_MAX_NAMED_CLASSES = 100
_IGNORED_COLOUR = (255, 255, 255)
_CELL_WIDTH_IN = 3.0
_SAMPLE_WIDTH_IN = 4.5  # Wide enough to see whether image and mask are aligned.
_MAX_TITLE_LENGTH = 44
_MAX_CELL_HEIGHT_IN = 9.0  # Limits very tall images, so that a picture of many of them can still be opened.


class Panel(NamedTuple):
    """One image of a comparison.

    Attributes:
        title: Text above the image.
        image: (H, W, 3) uint8.
        truth: (H, W) class indices, or None without ground truth.
        mask: (H, W) predicted class indices.
    """

    title: str
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.integer] | None
    mask: npt.NDArray[np.integer]


class LabelledPicture(NamedTuple):
    """One training sample, augmented as in training.

    Attributes:
        title: Text above the image.
        image: (H, W, 3) uint8.
        truth: (H, W) class indices.
    """

    title: str
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.integer]


class _Cell(NamedTuple):
    title: str
    picture: npt.NDArray[np.uint8] | None
    is_mask: bool = True


def colour_mask(mask: npt.NDArray[np.integer], classes: ClassMap) -> npt.NDArray[np.uint8]:
    """Return a mask (H, W) as (H, W, 3) uint8 RGB: each class in its palette colour, ignored pixels white."""
    colours = np.vstack([build_palette(classes.num_classes), [_IGNORED_COLOUR]]).astype(np.uint8)
    return colours[np.where(mask == classes.ignore_index, classes.num_classes, mask)]


def overlay_mask(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.integer], classes: ClassMap
) -> npt.NDArray[np.uint8]:
    """Return (H, W, 3) uint8 RGB: the image blended equally with its classes' colours, ignored pixels white."""
    mixed = (image.astype(np.uint16) + colour_mask(mask, classes)) // 2
    mixed[mask == classes.ignore_index] = _IGNORED_COLOUR
    return mixed.astype(np.uint8)


def draw_comparison(panels: Sequence[Panel], classes: ClassMap) -> bytes:
    """Draw image, truth (if any) and prediction side by side, one row per panel, with a legend; return a PNG file."""
    has_truth = any(panel.truth is not None for panel in panels)
    rows = []
    for panel in panels:
        row = [_Cell(panel.title, panel.image, is_mask=False)]
        if has_truth:
            row.append(_Cell("truth", None if panel.truth is None else colour_mask(panel.truth, classes)))
        rows.append([*row, _Cell("prediction", colour_mask(panel.mask, classes))])
    masks = [mask for panel in panels for mask in (panel.truth, panel.mask) if mask is not None]
    return _draw_grid(rows, _build_legend(masks, classes, has_ignored=has_truth and bool(classes.ignore_values)))


def draw_samples(samples: Sequence[LabelledPicture], classes: ClassMap) -> bytes:
    """Draw each training sample beside the same image overlaid with its truth, with a legend; return a PNG file."""
    rows = [
        [_Cell(sample.title, sample.image, is_mask=False), _Cell("truth", overlay_mask(*sample[1:], classes))]
        for sample in samples
    ]
    # Ignored pixels occur even if no mask has an ignored value, since pixels beyond an image's edges are ignored.
    legend = _build_legend([sample.truth for sample in samples], classes, has_ignored=True)
    return _draw_grid(rows, legend, _SAMPLE_WIDTH_IN)


def _draw_grid(
    rows: Sequence[Sequence[_Cell]], legend: Sequence[Patch], cell_width_in: float = _CELL_WIDTH_IN
) -> bytes:
    """Draw rows of pictures with a legend below them; the first picture sets the height of all rows."""
    first = rows[0][0].picture
    assert first is not None
    cell_height_in = min(cell_width_in * first.shape[0] / first.shape[1], _MAX_CELL_HEIGHT_IN) + 0.25
    width_in = cell_width_in * len(rows[0])
    longest_name = max(len(str(patch.get_label())) for patch in legend)
    num_columns = min(6, len(legend), max(1, int(width_in / (0.6 + 0.065 * longest_name))))
    legend_height_in = 0.2 + 0.2 * -(-len(legend) // num_columns)
    figure = Figure(figsize=(width_in, cell_height_in * len(rows) + legend_height_in), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, cells in zip(axes, rows, strict=True):
        for axis, cell in zip(row, cells, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_linewidth(0.5)  # A frame is needed because ignored pixels are white, like the page.
            axis.set_title(_shorten(cell.title), fontsize=8)
            if cell.picture is None:
                axis.set_axis_off()
            else:
                axis.imshow(cell.picture, interpolation="nearest" if cell.is_mask else "antialiased")
    figure.legend(handles=legend, loc="outside lower center", ncols=num_columns, fontsize=8)
    return _save(figure)


def _shorten(title: str) -> str:
    """Return a title that fits above a picture: the middle of a long one is replaced with an ellipsis."""
    half = _MAX_TITLE_LENGTH // 2
    return title if len(title) <= _MAX_TITLE_LENGTH else f"{title[: half - 1]}…{title[-half:]}"


def _build_legend(masks: Sequence[npt.NDArray[np.integer]], classes: ClassMap, has_ignored: bool) -> list[Patch]:
    """Return a legend patch for each class; if there are many classes, only for those in the masks."""
    shown = list(range(classes.num_classes))
    if len(shown) > _MAX_LEGEND_CLASSES:
        seen = {int(index) for mask in masks for index in np.unique(mask)}
        shown = sorted(seen - {classes.ignore_index})
    num_named = len(shown) if len(shown) <= _MAX_LEGEND_CLASSES else _MAX_LEGEND_CLASSES - 1
    colours = build_palette(classes.num_classes) / 255
    patches = [
        Patch(facecolor=tuple(colours[index]), edgecolor="black", label=classes.names[index])
        for index in shown[:num_named]
    ]
    if num_named < len(shown):
        patches.append(Patch(facecolor="none", label=f"and {len(shown) - num_named} more"))
    if has_ignored:
        patches.append(Patch(facecolor="white", edgecolor="black", label="not scored"))
    return patches


def draw_curves(history: Sequence[dict[str, Any]], classes: ClassMap) -> bytes:
    """Draw training and validation loss, learning rate, mean scores and IoU per class over epochs; return a PNG file.

    Scores are drawn only for evaluated epochs.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, rate), (means, ious) = figure.subplots(2, 2)
    evaluated = [metrics for metrics in history if "val_mean_iou" in metrics]
    _plot(loss, history, "loss", label="training")
    if losses := [metrics for metrics in evaluated if "val_loss" in metrics]:  # Not in those of earlier versions.
        _plot(loss, losses, "val_loss", label="validation")
    loss.legend(fontsize=7)
    _plot(rate, history, "learning_rate")
    for name in ("IoU", "Dice", "boundary IoU"):
        _plot(means, evaluated, f"val_mean_{name.lower().replace(' ', '_')}", label=f"mean {name}")
    shown = _choose_classes(evaluated, classes)
    colours = build_palette(classes.num_classes) / 255
    for index in shown:
        _plot(ious, evaluated, "val_dataset_iou", index, label=classes.names[index], color=colours[index])
    loss.set(title="loss", ylim=(0, None))
    rate.set(title="learning rate", ylim=(0, None))
    means.set(title="validation, mean over classes", ylim=(0, 1))
    which = "each class" if len(shown) == classes.num_classes else f"the {len(shown)} lowest classes"
    ious.set(title=f"validation IoU of {which}", ylim=(0, 1))
    for axis in (loss, rate, means, ious):
        axis.set(xlabel="epoch", xlim=(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    if evaluated:
        for axis in (means, ious):  # The legend is beside the axes, because anywhere inside it could hide curves.
            axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure)


def _choose_classes(evaluated: Sequence[dict[str, Any]], classes: ClassMap) -> list[int]:
    """Return the classes whose curves are drawn: all of them, or those with the lowest final IoU."""
    if not evaluated or classes.num_classes <= _MAX_CURVE_CLASSES:
        return list(range(classes.num_classes))
    last = _to_floats(evaluated[-1]["val_dataset_iou"])
    return sorted(np.argsort(last, kind="stable")[:_MAX_CURVE_CLASSES].tolist())  # NaN sorts last.


def _plot(axis: Axes, history: Sequence[dict[str, Any]], key: str, index: int | None = None, **style: Any) -> None:
    values = [metrics[key] if index is None else metrics[key][index] for metrics in history]
    axis.plot([metrics["epoch"] for metrics in history], _to_floats(values), marker=".", **style)


def _to_floats(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def draw_confusion(confusion: IntArray, classes: ClassMap) -> bytes:
    """Draw a confusion matrix as shares of each true class; return a PNG file.

    The row of a class without pixels is empty.

    Args:
        confusion: (C, C) pixel counts; rows are the truth.
        classes: The classes.
    """
    share = divide(confusion, confusion.sum(1, keepdims=True))
    num_classes = classes.num_classes
    is_numbered = num_classes <= _MAX_NUMBERED_CLASSES
    side_in = max(2.0, num_classes * min(0.45 if is_numbered else 0.2, 20 / num_classes))
    figure = Figure(figsize=(side_in + 2.5, side_in + 1.8), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=axis, label="share of the true class", fraction=0.05)
    named = range(0, num_classes, -(-num_classes // _MAX_NAMED_CLASSES))
    names = [classes.names[index] for index in named]
    axis.set_xticks(named, names, rotation=90, fontsize=8 if is_numbered else 7)
    axis.set_yticks(named, names, fontsize=8 if is_numbered else 7)
    axis.set(xlabel="prediction", ylabel="truth")
    if is_numbered:
        for row, column in np.argwhere(~np.isnan(share)).tolist():
            value = share[row, column]
            colour = "white" if value > 0.6 else "black" if value >= 0.005 else "lightgrey"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return _save(figure)


def draw_class_bars(values: Sequence[float | None], classes: ClassMap, title: str) -> bytes:
    """Draw one horizontal bar for each class whose value is defined; return a PNG file."""
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
