"""``run.json``: the fingerprint, inputs, library versions, status and counts of a segmentation run."""

import json
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, JsonValue
from rich.console import Console

from segray.errors import MissingFileError, RunMismatchError
from segray.runs.fingerprint import FORMAT_VERSION, Fingerprint, Record, read_record
from segray.runs.plan import Plan
from segray.schema import get_library_versions
from segray.storage import join_uri, read_bytes, write_bytes


class RunFingerprint(Fingerprint):
    """The model and the settings of a run; together with the plan they decide every byte of its rows.

    Attributes:
        bundle_sha256: sha256 of ``bundle.json``, which holds that of the weights.
        config: ``SegmentSettings.row_settings``, the device, and whether there is ground truth.
    """

    hash_messages: ClassVar[Mapping[str, str]] = {"bundle_sha256": "different bundle"}
    config_section: ClassVar[str] = "segment"

    bundle_sha256: str


class PlannedFingerprint(RunFingerprint):
    """The complete fingerprint of a run; ``plan_sha256`` and ``cut_sha256`` are the hashes of its ``Plan``."""

    plan_sha256: str
    cut_sha256: str


class RunCounts(Record):
    """Numbers of planned images and fragments; once the run is complete, also of ``ok`` rows and error rows by kind."""

    planned: int
    fragments: int
    ok: int | None = None
    errors: dict[str, int] | None = None


class RunFile(Record):
    """Content of ``run.json``.

    Attributes:
        format_version: Version of the layout of the run folder; files without it are version 1.
        inputs: URIs of the bundle, images and masks.
        versions: Versions of the libraries that decide what a run computes, by package name.
        status: ``complete`` once every planned image has a row and summary and report are written.
    """

    format_version: int = Field(FORMAT_VERSION, ge=1)
    fingerprint: PlannedFingerprint
    inputs: dict[str, JsonValue]
    versions: dict[str, str]
    status: Literal["running", "complete"]
    counts: RunCounts

    @classmethod
    def start(cls, fingerprint: RunFingerprint, plan: Plan, inputs: dict[str, JsonValue]) -> "RunFile":
        """Return the content for a run that is about to process its plan, with the installed library versions."""
        return cls(
            fingerprint=PlannedFingerprint(
                bundle_sha256=fingerprint.bundle_sha256,
                config=fingerprint.config,
                plan_sha256=plan.sha256,
                cut_sha256=plan.cut_sha256,
            ),
            inputs=inputs,
            versions=get_library_versions(),
            status="running",
            counts=RunCounts(planned=plan.num_images, fragments=plan.num_fragments),
        )

    def complete(self, num_ok: int, errors: Mapping[str, int]) -> "RunFile":
        """Return the content for the same run once it is complete, with its row counts."""
        counts = self.counts.model_copy(update={"ok": num_ok, "errors": dict(errors)})
        return self.model_copy(update={"status": "complete", "counts": counts})

    @property
    def plan(self) -> Plan:
        """The run's plan, without its images."""
        fingerprint, counts = self.fingerprint, self.counts
        return Plan(fingerprint.plan_sha256, fingerprint.cut_sha256, counts.planned, counts.fragments)

    def format(self) -> bytes:
        """Return the JSON file; equal content gives equal bytes."""
        content = {**self.model_dump(mode="json"), "counts": self.counts.model_dump(mode="json", exclude_none=True)}
        return json.dumps(content, indent=2).encode()


def get_run_uri(output_uri: str) -> str:
    """Return the URI of a run's ``run.json``."""
    return join_uri(output_uri, "run.json")


def read_run(output_uri: str) -> RunFile | None:
    """Return the content of ``run.json``, or None if there is no run in this folder.

    Raises:
        RunMismatchError: The file is not valid, or has a newer format version.
        StorageError: The store refused the request or failed.
    """
    return read_record(get_run_uri(output_uri), RunFile)


def require_run(output_uri: str) -> RunFile:
    """Return the content of ``run.json``.

    Raises:
        MissingFileError: There is no run in this folder.
        RunMismatchError: The file is not valid, or has a newer format version.
        StorageError: The store refused the request or failed.
    """
    run = read_run(output_uri)
    if run is None:
        raise MissingFileError(f"no run at {output_uri}: there is no run.json; give the --output of segray segment")
    return run


def require_same_plan(output_uri: str, plan: Plan) -> None:
    """Raise if another process has updated the plan of a run in the meantime (``segment.retry_errors``).

    Raises:
        RunMismatchError: The plan in ``run.json`` is not ``plan``.
    """
    run = read_run(output_uri)
    if run is None or run.plan != plan:
        raise RunMismatchError(
            f"{output_uri}: another process has updated the plan with fixed images; rerun the same command"
        )


def warn_of_changed_versions(run: RunFile, console: Console) -> None:
    """Print a warning if library versions changed since the run started: new rows may differ in their last bits."""
    installed = get_library_versions()
    changed = [
        f"{name} was {recorded}, is {installed.get(name)}"
        for name, recorded in run.versions.items()
        if installed.get(name) != recorded
    ]
    if changed:
        console.print(
            f"warning: library versions changed since the run started ({', '.join(changed)}); rows written now may "
            "differ in their last bits",
            highlight=False,
        )


def write_if_changed(uri: str, content: bytes) -> None:
    """Write a file unless it already has this content."""
    try:
        if read_bytes(uri) == content:
            return
    except MissingFileError:
        pass
    write_bytes(uri, content)
