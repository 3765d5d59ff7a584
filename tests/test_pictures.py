"""Pictures: the colours are those of the classes, and every picture is one that opens."""

import io

import numpy as np
import pytest
from PIL import Image

from segray.classes import ClassMap, build_palette
from segray.pictures import Panel, colour_mask, draw_class_bars, draw_comparison, draw_curves

CLASSES = ClassMap(("road", "car", "tree"), (0, 1, 2), (255,))
SCORES = {"loss": 1.0, "learning_rate": 0.1, "val_mean_iou": 0.5, "val_mean_dice": 0.6, "val_iou": [0.5, None, 0.25]}


def count_colour(png: bytes, colour: tuple[int, ...]) -> int:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return int((pixels == colour).all(axis=-1).sum())


def test_each_class_has_its_colour_and_ignored_pixels_are_white() -> None:
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    palette = build_palette(3)
    np.testing.assert_array_equal(colour_mask(mask, CLASSES).reshape(4, 3), [*palette, (255, 255, 255)])


def test_a_comparison_shows_image_truth_and_prediction_in_this_order() -> None:
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


def test_without_truth_there_is_no_column_for_it() -> None:
    panel = Panel("a", np.zeros((40, 60, 3), np.uint8), None, np.ones((40, 60), np.uint8))
    narrow = Image.open(io.BytesIO(draw_comparison([panel], CLASSES)))
    wide = Image.open(io.BytesIO(draw_comparison([panel._replace(truth=panel.mask)], CLASSES)))
    assert narrow.width * 3 == wide.width * 2


def test_curves_and_bars_leave_out_what_is_undefined() -> None:
    history = [{**SCORES, "epoch": epoch} for epoch in (1, 2)]
    assert Image.open(io.BytesIO(draw_curves(history, CLASSES))).width > 500
    car = tuple(int(value) for value in build_palette(3)[1])
    with_car, without = (draw_class_bars([0.5, value, 0.25], CLASSES, "IoU") for value in (0.9, None))
    assert count_colour(with_car, car) > 1000
    assert count_colour(without, car) == 0
