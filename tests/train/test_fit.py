"""The history of a run as a table."""

import csv
import io

from segray.classes import ClassMap
from segray.train.fit import format_metrics_csv


def test_each_score_stands_under_its_name_and_an_undefined_one_is_empty() -> None:
    metrics = {
        "epoch": 3,
        "loss": 0.5,
        "learning_rate": 0.01,
        "images_per_s": 7.5,
        "val_mean_iou": 0.25,
        "val_mean_dice": 0.4,
        "val_iou": [0.25, None],
        "val_dice": [0.4, None],
        "val_confusion": [[1, 0], [0, 1]],
    }
    (row,) = csv.DictReader(io.StringIO(format_metrics_csv([metrics], ClassMap(("a", "b"), (0, 1))).decode()))
    assert row == {
        "epoch": "3",
        "loss": "0.5",
        "learning_rate": "0.01",
        "images_per_s": "7.5",
        "val_mean_iou": "0.25",
        "val_mean_dice": "0.4",
        "val_iou_a": "0.25",
        "val_iou_b": "",
        "val_dice_a": "0.4",
        "val_dice_b": "",
    }
