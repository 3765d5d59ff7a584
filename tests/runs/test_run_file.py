"""``run.json``: content, compatibility with existing files, and refusal of files that are not valid."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from segray.errors import RunMismatchError
from segray.runs.plan import Plan
from segray.runs.run_file import RunFile, RunFingerprint, read_run, require_same_plan, warn_of_changed_versions

PLAN = Plan("a" * 64, "b" * 64, 10, 3)
FINGERPRINT = RunFingerprint(bundle_sha256="c" * 64, config={"batch_size": 3, "reduce_jpeg": False, "limit": None})
INPUTS: dict[str, Any] = {"bundle": "/bundle", "images": ["/images"], "masks": []}
# What segray wrote before run.json had a format version.
UNVERSIONED = {
    "fingerprint": {
        "bundle_sha256": "c" * 64,
        "config": {"batch_size": 3, "reduce_jpeg": False, "limit": None},
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
    running = RunFile.start(FINGERPRINT, PLAN, INPUTS)
    content = json.loads(running.format())
    assert content == {
        **UNVERSIONED,
        "format_version": 1,
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


def test_files_without_a_format_version_are_read(tmp_path: Path) -> None:
    save(tmp_path, UNVERSIONED)
    run = read_run(str(tmp_path))
    assert run is not None
    assert (run.format_version, run.status, run.plan) == (1, "complete", PLAN)
    assert run.fingerprint.list_differences(FINGERPRINT) == []


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, {**UNVERSIONED, "added": 1})
    assert read_run(str(tmp_path)) is not None


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_run(str(tmp_path)) is None


def test_a_newer_format_version_is_refused_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    save(tmp_path, {"format_version": 2, "tables": []})
    with pytest.raises(RunMismatchError, match=r"run\.json: format version 2, but .* reads up to 1; upgrade segray"):
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
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: object) -> None:
    save(tmp_path, content)
    with pytest.raises(RunMismatchError, match=r"run\.json: not written by this version of segray; choose another"):
        read_run(str(tmp_path))


def test_every_difference_of_bundle_and_settings_is_named() -> None:
    recorded = RunFile.start(FINGERPRINT, PLAN, INPUTS).fingerprint
    recorded.require_same(FINGERPRINT, "/output")
    other = RunFingerprint(bundle_sha256="d" * 64, config={**FINGERPRINT.config, "batch_size": 4})
    message = r"^/output belongs to another run \(different bundle; segment\.batch_size: .*4\); choose another --out"
    with pytest.raises(RunMismatchError, match=message):
        recorded.require_same(other, "/output")


def test_a_plan_that_another_process_updated_is_refused(tmp_path: Path) -> None:
    save(tmp_path, UNVERSIONED)
    require_same_plan(str(tmp_path), PLAN)
    with pytest.raises(RunMismatchError, match="another process has updated the plan"):
        require_same_plan(str(tmp_path), Plan("e" * 64, "b" * 64, 10, 3))


def test_changed_library_versions_give_a_warning() -> None:
    run = RunFile.start(FINGERPRINT, PLAN, INPUTS)
    printed = io.StringIO()
    warn_of_changed_versions(run, Console(file=printed, width=200))
    assert printed.getvalue() == ""
    older = run.model_copy(update={"versions": {**run.versions, "torch": "1.0"}})
    warn_of_changed_versions(older, Console(file=printed, width=500))
    assert f"torch was 1.0, is {run.versions['torch']}" in printed.getvalue()
