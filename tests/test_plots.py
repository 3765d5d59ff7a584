"""Pictures: classes have their palette colours, and every picture can be opened."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from segray.data.classes import ClassMap, build_palette
from segray.plots import (
    LabelledPicture,
    Panel,
    colour_mask,
    draw_class_bars,
    draw_comparison,
    draw_confusion,
    draw_curves,
    draw_samples,
    overlay_mask,
)

CLASSES = ClassMap(("road", "car", "tree"), (0, 1, 2), (255,))
TRAINED = {"loss": 1.0, "learning_rate": 0.1}
SCORES = {
    "val_mean_iou": 0.5,
    "val_mean_dice": 0.6,
    "val_mean_boundary_iou": None,
    "val_dataset_iou": [0.5, None, 0.25],
}


def open_picture(png: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def count_colour(png: bytes, colour: tuple[int, ...]) -> int:
    return int((open_picture(png) == colour).all(axis=-1).sum())


def test_classes_have_their_palette_colours_and_ignored_pixels_are_white() -> None:
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    palette = build_palette(3)
    np.testing.assert_array_equal(colour_mask(mask, CLASSES).reshape(4, 3), [*palette, (255, 255, 255)])


def test_a_comparison_shows_image_truth_and_prediction_in_that_order() -> None:
    image = np.full((40, 60, 3), (10, 200, 30), np.uint8)
    truth, mask = np.full((40, 60), 1, np.uint8), np.full((40, 60), 2, np.uint8)
    picture = Image.open(io.BytesIO(draw_comparison([Panel("a", image, truth, mask)] * 2, CLASSES))).convert("RGB")
    pixels = np.asarray(picture)
    above_legend = pixels[: int(picture.height * 0.8)]
    columns = [
        np.flatnonzero((above_legend == colour).all(axis=-1).sum(axis=0) > 20).mean()
        for colour in ((10, 200, 30), build_palette(3)[1], build_palette(3)[2])
    ]
    assert columns == sorted(columns)
    assert columns == pytest.approx([picture.width * part for part in (1 / 6, 1 / 2, 5 / 6)], rel=0.05)


def test_a_comparison_without_truth_has_no_truth_column() -> None:
    panel = Panel("a", np.zeros((40, 60, 3), np.uint8), None, np.ones((40, 60), np.uint8))
    narrow = Image.open(io.BytesIO(draw_comparison([panel], CLASSES)))
    wide = Image.open(io.BytesIO(draw_comparison([panel._replace(truth=panel.mask)], CLASSES)))
    assert narrow.width * 3 == wide.width * 2


def test_an_overlay_blends_image_and_mask_and_ignored_pixels_are_white() -> None:
    image = np.array([[[10, 200, 31], [255, 255, 255]], [[0, 0, 0], [7, 7, 7]]], np.uint8)
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    palette = build_palette(3).astype(int)
    expected = (image.reshape(4, 3)[:3].astype(int) + palette) // 2
    np.testing.assert_array_equal(overlay_mask(image, mask, CLASSES).reshape(4, 3), [*expected, (255, 255, 255)])


def test_samples_are_rows_of_an_image_and_its_overlay() -> None:
    colours = ((10, 200, 30), (90, 20, 250))
    truth = np.ones((40, 60), np.uint8)
    samples = [LabelledPicture("a", np.full((40, 60, 3), colour, np.uint8), truth) for colour in colours]
    pixels = open_picture(draw_samples(samples, CLASSES))
    for row, colour in enumerate(colours):
        overlaid = tuple((np.array(colour) + build_palette(3)[1]) // 2)
        for column, shown in enumerate((colour, overlaid)):
            rows, columns = np.nonzero((pixels == shown).all(axis=-1))
            assert len(rows) > 50_000
            assert columns.mean() == pytest.approx(pixels.shape[1] * (0.25 + column / 2), rel=0.05)
            assert rows.mean() == pytest.approx(pixels.shape[0] * (0.25 + row / 2), rel=0.15)


def test_curves_omit_epochs_that_were_not_evaluated_and_undefined_scores() -> None:
    history: list[dict[str, Any]] = [
        {**TRAINED, "epoch": 1},
        {**TRAINED, **SCORES, "epoch": 2},
        {**TRAINED, "epoch": 3},
        {**TRAINED, **SCORES, "epoch": 4},
    ]
    line = [tuple(int(value) for value in colour) for colour in build_palette(3)]
    evaluated = draw_curves(history, CLASSES)
    # Class 1 is only in the legend.
    assert [count_colour(evaluated, colour) > 300 for colour in line] == [True, False, True]
    never = draw_curves([history[0], history[2]], CLASSES)
    assert [count_colour(never, colour) for colour in line] == [0, 0, 0]
    worst_first = [{**TRAINED, **SCORES, "epoch": 1, "val_dataset_iou": [0.9] * 5 + [None] + [0.1] * 24}]
    many = ClassMap(tuple(map(str, range(30))), tuple(range(30)))
    picture = draw_curves(worst_first, many)
    shown = [count_colour(picture, tuple(int(value) for value in colour)) > 0 for colour in build_palette(30)]
    assert (sum(shown), any(shown[:6])) == (12, False)


def test_a_confusion_matrix_has_truth_in_rows_and_an_empty_row_for_an_absent_class() -> None:
    pixels = open_picture(draw_confusion(np.array([[0, 60, 0], [0, 0, 0], [10, 0, 30]]), CLASSES)).astype(int)
    darkest = np.argwhere(pixels.sum(axis=-1) == (8 + 48 + 107))  # The end of the colour scale: a share of 1.
    in_matrix = darkest[darkest[:, 1] < pixels.shape[1] * 0.75]  # The colour bar is on the right.
    top, left = in_matrix.min(0)
    side = len(np.unique(in_matrix[:, 0]))
    # The red channel in a corner of each cell.
    share = pixels[top + side // 8 :: side][:3, left - side + side // 8 :: side][:, :3, 0]
    assert share[0].tolist() == [247, 8, 247]
    assert share[1].tolist() == [255, 255, 255]
    assert 8 < share[2, 2] < share[2, 0] < share[2, 1] == 247


@pytest.mark.parametrize("num_classes", [2, 24, 30, 300])
def test_pictures_of_any_number_of_classes_can_be_opened(num_classes: int) -> None:
    classes = ClassMap(tuple(f"class {index}" for index in range(num_classes)), tuple(range(num_classes)))
    assert open_picture(draw_confusion(np.eye(num_classes, dtype=np.int64), classes)).shape[1] < 3000
    truth = np.arange(num_classes, dtype=np.uint16)[:, None].repeat(num_classes, 1)
    image = np.zeros((*truth.shape, 3), np.uint8)
    assert open_picture(draw_samples([LabelledPicture("x" * 200, image, truth)], classes)).shape[1] == 2 * 495


def test_a_picture_of_the_maximum_number_of_tall_samples_can_be_opened() -> None:
    tall = LabelledPicture("a", np.zeros((320, 16, 3), np.uint8), np.zeros((320, 16), np.uint8))
    assert 20_000 < open_picture(draw_samples([tall] * 32, CLASSES)).shape[0] < 2**16


def test_bars_omit_undefined_values() -> None:
    car = tuple(int(value) for value in build_palette(3)[1])
    with_car, without = (draw_class_bars([0.5, value, 0.25], CLASSES, "IoU") for value in (0.9, None))
    assert count_colour(with_car, car) > 1000
    assert count_colour(without, car) == 0
