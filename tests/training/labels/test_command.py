"""The label check: suspected groups, folds compared with each other, and findings that are shown in any case."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from segray.config import TrainConfig
from segray.data.sample_list import Folds, Sample, SampleList, Splits
from segray.errors import FaultKind, StorageError
from segray.training.labels import command
from segray.training.labels.command import check_config, check_folds, run_check, suspect_shared_groups
from segray.training.labels.near_duplicates import NO_THUMBPRINT
from segray.training.labels.split_report import LabelFault, SplitReport, WarningKind


def build_config(folds: int | None = None, **val: Any) -> TrainConfig:
    folders = {"images": "/d/images", "masks": "/d/masks"}
    data = {"train": folders, "val": val if "fraction" in val else {**folders, **val}, "class_names": ["a", "b"]}
    return TrainConfig.model_validate(
        {"data": data, "image_size": [32, 32], "train": {"folds": folds}, "output": "/nowhere/out"}
    )


def build_samples(*names: str) -> list[Sample]:
    return [Sample(f"/d/images/{name}.png", f"/d/masks/{name}.png") for name in names]


def test_suspected_groups_are_one_warning_with_the_setting_that_separates_them() -> None:
    splits = Splits(build_samples("a_1", "a_2", "b_1"), build_samples("c_1", "a_3", "a_4"))
    (warning,) = suspect_shared_groups(build_config(), splits)
    assert (warning.uri, warning.kind) == ("/d/images/a_3.png", WarningKind.SHARED_GROUP)
    assert warning.message == (
        "one of 2 images in val whose names suggest groups that are in train too, such as 'a' with 2 images in train "
        "and 2 in val"
    )
    advice = r"add group_by: '^(.+?)(?:[-_]\d+)+$' to data.val"
    assert warning.remedy.endswith(f"{advice}, and move whole groups to one side, or set train.folds")
    (warning,) = suspect_shared_groups(build_config(fraction=0.5), splits)
    assert warning.remedy.endswith(advice)
    (warning,) = suspect_shared_groups(build_config(folds=2), splits)
    assert warning.remedy.endswith(advice)
    assert warning.message.endswith("'a' with 2 images in other folds and 2 in fold 1")
    assert suspect_shared_groups(build_config(group_by="^."), splits) == []
    layout = {"layout": {"oxford_iiit_pet": {"root": "/d"}}}
    oxford = TrainConfig.model_validate({"data": layout, "image_size": [32, 32], "output": "/nowhere/out"})
    assert suspect_shared_groups(oxford, splits) == []


def test_equal_images_in_two_folds_are_one_warning(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    content = {"a": b"1", "b": b"2", "c": b"3", "d": b"1", "e": b"2"}

    def check(_: TrainConfig, samples: SampleList, *__: object) -> SplitReport:
        digests = b"".join(content[sample.image_uri[len("/d/images/")]] * 16 for sample in samples)
        thumbprints = NO_THUMBPRINT * len(samples)
        return replace(SplitReport.empty(2), num_samples=len(samples), digests=digests, thumbprints=thumbprints)

    monkeypatch.setattr(command, "check_labels", check)
    folds = Folds(SampleList.of(build_samples(*content)), np.array([0, 1, 0, 1, 2], np.uint8))
    reports = check_folds(build_config(folds=3), folds, console)
    assert {name: report.num_samples for name, report in reports.items()} == {"fold 1": 2, "fold 2": 2, "fold 3": 1}
    warnings = [(name, warning.uri, warning.message) for name in reports for warning in reports[name].warnings]
    assert warnings == [
        ("fold 2", "/d/images/d.png", "same pixels as /d/images/a.png in fold 1"),
        ("fold 3", "/d/images/e.png", "same pixels as /d/images/b.png in fold 2"),
    ]


@pytest.mark.parametrize("num_px", [0, 1])
def test_findings_are_shown_although_the_output_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, console: Console, capsys: pytest.CaptureFixture[str], num_px: int
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("/nowhere/out: permission denied")

    counts = np.full(2, num_px)
    report = replace(SplitReport.empty(2), num_samples=1, pixel_count=counts)
    fault = LabelFault("/d/masks/a.png", FaultKind.MASK_MISMATCH, "bad", "draw it again")
    reports = {"train": report, "val": replace(report, faults=[] if num_px else [fault])}
    monkeypatch.setattr(command, "remove_record", fail)
    monkeypatch.setattr("segray.training.labels.record.LabelRecord.write", fail)
    monkeypatch.setattr(command, "check_splits", lambda *_: reports)
    monkeypatch.setattr(command, "load_splits", lambda *_: Splits([], []))
    monkeypatch.setattr(command, "connect_ray", nullcontext)
    assert run_check(build_config(), console) == bool(num_px)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "warning: the result is not kept for training: /nowhere/out: permission denied"
    assert ("/d/masks/a.png: mask_mismatch: bad; draw it again" in lines) == (num_px == 0)
    assert check_config(build_config(), console).ok == bool(num_px)
