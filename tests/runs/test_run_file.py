"""``run.json``: content, compatibility with existing files, and refusal of files that are not valid."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from segray.config import SegmentSettings
from segray.errors import RunMismatchError
from segray.runs.plan import Plan
from segray.runs.run_file import RunFile, RunFingerprint, read_run, read_same_run, warn_of_changed_versions
from segray.runs.run_settings import get_recorded_defaults

PLAN = Plan("a" * 64, "b" * 64, 10, 3)
SETTINGS = SegmentSettings(batch_size=3)
FINGERPRINT = RunFingerprint(bundle_sha256="c" * 64, config={**SETTINGS.row_settings, "ground_truth": True})
INPUTS: dict[str, Any] = {"bundle": "/bundle", "images": ["/images"], "masks": []}
# What segray wrote before run.json had a format version.
UNVERSIONED = {
    "fingerprint": {
        "bundle_sha256": "c" * 64,
        "config": {"batch_size": 3, "fragment_size": 64, "max_image_px": 1000, "ground_truth": True},
        "plan_sha256": "a" * 64,
        "cut_sha256": "b" * 64,
    },
    "inputs": INPUTS,
    "versions": {"torch": "2.11"},
    "status": "complete",
    "counts": {"planned": 10, "fragments": 3, "ok": 9, "errors": {"truncated": 1}},
}


def save(output: Path, content: object) -> None:
    (output / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_content_is_as_documented_and_read_back_unchanged(tmp_path: Path) -> None:
    running = RunFile.start(FINGERPRINT, PLAN, INPUTS, SETTINGS)
    content = json.loads(running.format())
    assert content == {
        "format_version": 2,
        "fingerprint": {
            "bundle_sha256": "c" * 64,
            "config": {"mask_encoding": "raw", "reduce_jpeg": False, "ground_truth": True},
            "plan_sha256": "a" * 64,
            "cut_sha256": "b" * 64,
        },
        "computed_with": [
            {"batch_size": 3, "precision": "bf16", "compile": False, "num_threads_per_predictor": 1, "device": "cpu"}
        ],
        "limits": {"max_image_px": SETTINGS.max_image_px, "image_timeout_s": 300},
        "inputs": INPUTS,
        "versions": running.versions,
        "status": "running",
        "counts": {"planned": 10, "fragments": 3},
    }
    complete = running.complete(9, {"truncated": 1})
    assert json.loads(complete.format()) == {**content, "status": "complete", "counts": UNVERSIONED["counts"]}
    for run in (running, complete):
        save(tmp_path, run.format().decode())
        assert read_run(str(tmp_path)) == run
        assert run.plan == PLAN


@pytest.mark.parametrize("version", [{}, {"format_version": 1}])
def test_files_of_format_1_are_converted(tmp_path: Path, version: dict[str, int]) -> None:
    save(tmp_path, {**UNVERSIONED, **version})
    run = read_run(str(tmp_path))
    assert run is not None
    assert (run.format_version, run.status, run.plan) == (2, "complete", PLAN)
    assert run.fingerprint.config == {"ground_truth": True}
    assert run.fingerprint.list_differences(FINGERPRINT) == []
    assert run.computed_with == [SETTINGS.bit_settings]
    assert run.limits == {"max_image_px": 1000, "image_timeout_s": 300}


def test_the_defaults_of_recorded_settings_do_not_change() -> None:
    """They stand for settings that a folder does not record, so changing one needs a new format version."""
    assert get_recorded_defaults() == {
        "mask_encoding": "raw",
        "reduce_jpeg": False,
        "ground_truth": False,
        "batch_size": 8,
        "precision": "bf16",
        "compile": False,
        "num_threads_per_predictor": 1,
        "device": "cpu",
        "max_image_px": 100_000_000,
        "image_timeout_s": 300,
    }


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, {**UNVERSIONED, "added": 1})
    assert read_run(str(tmp_path)) is not None


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_run(str(tmp_path)) is None


def test_a_newer_format_version_is_refused_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    save(tmp_path, {"format_version": 3, "tables": []})
    with pytest.raises(RunMismatchError, match=r"run\.json: format version 3, but .* reads up to 2; upgrade segray"):
        read_run(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        b"\xff\xfe".decode("latin-1"),
        {},
        {**UNVERSIONED, "fingerprint": {}},
        {**UNVERSIONED, "counts": {"planned": "10", "fragments": 3}},
        {**UNVERSIONED, "status": "other"},
        {**UNVERSIONED, "format_version": "1"},
        {**UNVERSIONED, "format_version": 0},
        {**UNVERSIONED, "format_version": 2},
        {**UNVERSIONED, "format_version": 2, "computed_with": [], "limits": {}},
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: object) -> None:
    save(tmp_path, content)
    with pytest.raises(RunMismatchError, match=r"run\.json: not written by this version of segray; choose another"):
        read_run(str(tmp_path))


def test_every_difference_of_bundle_and_settings_is_named() -> None:
    recorded = RunFile.start(FINGERPRINT, PLAN, INPUTS, SETTINGS).fingerprint
    recorded.require_same(FINGERPRINT, "/output")
    other = RunFingerprint(bundle_sha256="d" * 64, config={**FINGERPRINT.config, "mask_encoding": "png"})
    message = r"^/output belongs to another run \(different bundle; segment\.mask_enc.*: .*png'\); choose another --out"
    with pytest.raises(RunMismatchError, match=message):
        recorded.require_same(other, "/output")


def test_a_plan_that_another_process_updated_is_refused(tmp_path: Path) -> None:
    save(tmp_path, UNVERSIONED)
    assert read_same_run(str(tmp_path), PLAN) == read_run(str(tmp_path))
    with pytest.raises(RunMismatchError, match="another process has updated the plan"):
        read_same_run(str(tmp_path), Plan("e" * 64, "b" * 64, 10, 3))


def test_the_settings_that_two_drivers_compute_with_are_both_kept() -> None:
    first = RunFile.start(FINGERPRINT, PLAN, INPUTS, SETTINGS)
    second = first.resume(PLAN, INPUTS, SegmentSettings(batch_size=4))
    third = first.resume(PLAN, INPUTS, SegmentSettings(batch_size=5))
    merged = second.add_computed_with(third).complete(10, {})
    assert [bits["batch_size"] for bits in merged.computed_with] == [3, 4, 5]
    assert merged.add_computed_with(second).computed_with == merged.computed_with


def test_changed_library_versions_give_a_warning() -> None:
    run = RunFile.start(FINGERPRINT, PLAN, INPUTS, SETTINGS)
    printed = io.StringIO()
    warn_of_changed_versions(run, Console(file=printed, width=200))
    assert printed.getvalue() == ""
    older = run.model_copy(update={"versions": {**run.versions, "torch": "1.0"}})
    warn_of_changed_versions(older, Console(file=printed, width=500))
    assert f"torch was 1.0, is {run.versions['torch']}" in printed.getvalue()
