"""Printed label reports: every kind of finding is shown, and long lists of one kind are truncated."""

import pytest
from rich.console import Console

from segray.data.classes import ClassMap
from segray.data.manifest import Unpaired
from segray.errors import FaultKind
from segray.training.labels.report import LabelReport, print_findings, print_warnings
from segray.training.labels.split_report import LabelFault, SplitReport, WarningKind

CLASSES = ClassMap(("a", "b"), (0, 1))


def list_faults(count: int, remedy: str) -> list[LabelFault]:
    return [LabelFault(f"{remedy}/{index}.png", FaultKind.MASK_MISMATCH, "bad", remedy) for index in range(count)]


def warn(count: int) -> dict[str, SplitReport]:
    report = SplitReport.empty(2)
    report.warnings.extend(LabelFault(f"{i}.png", WarningKind.DUPLICATE, "seen", "keep one") for i in range(count))
    return {"train": SplitReport.empty(2), "val": report}


def test_many_findings_of_one_kind_are_truncated_and_counted(
    console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = warn(2)
    splits["train"].faults.extend([*list_faults(3, "turn it"), *list_faults(10_000, "declare 7")])
    report = LabelReport(splits, [Unpaired("a.png", "mask")], CLASSES)
    assert not report.ok
    print_findings(report, console)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("declare 7/") for line in lines) == 100
    assert sum(line.startswith("turn it/") for line in lines) == 3
    assert lines[:2] == [f"warning: {i}.png: duplicate: seen; keep one" for i in range(2)]
    assert lines[-5:] == [
        "2 x warning: duplicate: keep one",
        "10,000 x mask_mismatch: declare 7 (first 100 listed; use --all to list every file)",
        "3 x mask_mismatch: turn it",
        "1 x no mask of this name: add it, remove this file, or use a manifest",
        "0 images and masks checked, 10004 faults, 2 warnings",
    ]
    print_findings(report, console, list_all=True)
    printed = capsys.readouterr().out
    assert sum(line.startswith("declare 7/") for line in printed.splitlines()) == 10_000
    assert "--all" not in printed


def test_training_prints_three_warnings_and_counts_the_rest(
    console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    print_warnings(warn(3), console)
    assert capsys.readouterr().out.count("\n") == 3
    print_warnings(warn(12), console)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"warning: {i}.png: duplicate: seen; keep one" for i in range(3)),
        "warning: and 9 more (segray check lists all)",
    ]


def test_training_prints_the_first_warning_of_each_kind(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    reports = warn(5)
    for kind in (WarningKind.NEAR_DUPLICATE, WarningKind.SHARED_GROUP, WarningKind.INTERPOLATED):
        reports["val"].warnings.append(LabelFault("x.png", kind, "seen", "keep one"))
    print_warnings(reports, console)
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split(": ")[2] for line in lines[:-1]]
    assert kinds == ["duplicate", "near_duplicate", "shared_group", "interpolated"]
    assert lines[-1] == "warning: and 4 more (segray check lists all)"
