"""Scores of a cross-validation: their spread over the folds, compared with numpy, and the files that hold them."""

import csv
import io
import json
from typing import Any

import numpy as np
import pytest

from segray.training.folds.estimate import Estimate, describe_spread


def build_scores(ious: list[float | None], dices: list[float | None]) -> dict[str, Any]:
    means = [float(np.mean([value for value in values if value is not None])) for values in (ious, dices)]
    return {
        "val_dataset_iou": ious,
        "val_dataset_dice": dices,
        "val_mean_iou": means[0],
        "val_mean_dice": means[1],
    }


ESTIMATE = Estimate(
    ("road", "sign"),
    (10, 20, 30),
    (
        build_scores([0.9, None], [0.95, None]),
        build_scores([0.8, 0.2], [0.9, 0.3]),
        build_scores([0.4, None], [0.5, None]),
    ),
    build_scores([0.7, 0.1], [0.8, 0.2]),
)


def test_the_spread_is_over_the_folds_where_a_class_is_defined() -> None:
    (name, road), (_, sign), (last, mean) = ESTIMATE.rows
    assert (name, last) == ("road", "mean")
    assert road["iou"].pooled == 0.7
    assert road["iou"].std == pytest.approx(np.std([0.9, 0.8, 0.4], ddof=1))
    assert road["dice"][2:] == (0.5, 0.95, (0.95, 0.9, 0.5))
    assert sign["iou"] == (0.1, None, 0.2, 0.2, (None, 0.2, None))
    assert mean["iou"].std == pytest.approx(np.std([0.9, 0.5, 0.4], ddof=1))
    assert describe_spread(sign["dice"]) == ["0.2000", "–", "0.3000", "0.3000"]


def test_the_files_hold_every_class_and_fold() -> None:
    rows = list(csv.DictReader(io.StringIO(ESTIMATE.format_csv().decode())))
    assert [row["class"] for row in rows] == ["road", "sign", "mean"]
    assert rows[0]["iou"] == "0.7"
    assert rows[0]["iou_fold_3"] == "0.4"
    assert rows[1]["dice_std"] == ""
    content = json.loads(ESTIMATE.format_json())
    assert content["pooled"]["val_mean_iou"] == pytest.approx(0.4)
    assert [(fold["fold"], fold["num_images"]) for fold in content["folds"]] == [(1, 10), (2, 20), (3, 30)]
    assert content["folds"][1]["val_dataset_iou"] == [0.8, 0.2]
