"""``run.json``: the fingerprint, inputs, library versions, status and counts of a segmentation run."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator
from rich.console import Console

from segray.config import SegmentSettings
from segray.errors import MissingFileError, RunMismatchError
from segray.runs.fingerprint import Fingerprint, Record, read_record
from segray.runs.plan import Plan
from segray.runs.run_settings import (
    fill_in_defaults,
    require_allowed_changes,
    require_known_settings,
    upgrade_format_1,
)
from segray.schema import get_library_versions
from segray.storage import join_uri, read_bytes, write_bytes

FORMAT_VERSION = 2  # version of the layout of the run folder


class RunFingerprint(Fingerprint):
    """The model of a run and the settings that change its rows.

    Together with the plan, the limits and the settings that change only the last bits, they decide every byte of the
    rows.

    Attributes:
        bundle_sha256: sha256 of ``bundle.json``, which holds that of the weights.
        config: ``SegmentSettings.row_settings``, and whether there is ground truth.
    """

    hash_messages: ClassVar[Mapping[str, str]] = {"bundle_sha256": "different bundle"}
    config_section: ClassVar[str] = "segment"

    bundle_sha256: str

    def list_differences(self, current: Fingerprint) -> list[str]:
        """See ``Fingerprint.list_differences``, with defaults for settings that were added later."""
        config = fill_in_defaults(self.config, current.config)
        return Fingerprint.list_differences(self.model_copy(update={"config": config}), current)


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
        format_version: Version of the layout of the run folder; files without it are version 1. Older layouts are
            converted when they are read.
        computed_with: The bit settings that rows were computed with, in the order of the calls that changed them.
        limits: The limits that the rows keep.
        inputs: URIs of the bundle, images and masks.
        versions: Versions of the libraries that decide what a run computes, by package name.
        status: ``complete`` once every planned image has a row and summary and report are written.
    """

    newest_format: ClassVar[int] = FORMAT_VERSION

    format_version: int = Field(FORMAT_VERSION, ge=1)
    fingerprint: PlannedFingerprint
    computed_with: list[dict[str, JsonValue]] = Field(min_length=1)
    limits: dict[str, int | float]
    inputs: dict[str, JsonValue]
    versions: dict[str, str]
    status: Literal["running", "complete"]
    counts: RunCounts

    @model_validator(mode="before")
    @classmethod
    def _convert_older_format(cls, content: Any) -> Any:
        is_format_1 = isinstance(content, dict) and content.get("format_version", 1) == 1
        return upgrade_format_1(content) if is_format_1 else content

    @classmethod
    def start(
        cls, fingerprint: RunFingerprint, plan: Plan, inputs: dict[str, JsonValue], settings: SegmentSettings
    ) -> "RunFile":
        """Return the content for a new run that is about to process its plan, with the installed library versions."""
        return cls(
            fingerprint=_add_plan(fingerprint, plan),
            computed_with=[settings.bit_settings],
            limits=settings.limits,
            inputs=inputs,
            versions=get_library_versions(),
            status="running",
            counts=RunCounts(planned=plan.num_images, fragments=plan.num_fragments),
        )

    def resume(self, plan: Plan, inputs: dict[str, JsonValue], settings: SegmentSettings) -> "RunFile":
        """Return the content for this run while a later call processes fragments of ``plan``."""
        return self.add_computed_with(RunFile.start(self.fingerprint, plan, inputs, settings))

    def add_computed_with(self, other: "RunFile") -> "RunFile":
        """Return the content of ``other``, with the bit settings of both files in order."""
        added = [bits for bits in other.computed_with if not self._was_computed_with(bits)]
        return other.model_copy(update={"computed_with": [*self.computed_with, *added]})

    def _was_computed_with(self, bits: Mapping[str, JsonValue]) -> bool:
        return any(fill_in_defaults(recorded, bits) == bits for recorded in self.computed_with)

    def require_compatible(self, fingerprint: RunFingerprint, settings: SegmentSettings, output_uri: str) -> list[str]:
        """Compare the run with a later call on its folder.

        Returns:
            The changes of bit settings that ``segment.allow_mixed`` allows, one phrase each.

        Raises:
            RunMismatchError: The bundle differs, or settings that this call may not change; names every difference.
        """
        bits = settings.bit_settings
        require_known_settings(self.fingerprint.config, fingerprint.config, output_uri)
        require_known_settings(self.limits, settings.limits, output_uri)
        for recorded in self.computed_with:
            require_known_settings(recorded, bits, output_uri)
        self.fingerprint.require_same(fingerprint, output_uri)
        known_bits = bits if self._was_computed_with(bits) else self.computed_with[-1]
        return require_allowed_changes(known_bits, self.limits, settings, output_uri)

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


def _add_plan(fingerprint: RunFingerprint, plan: Plan) -> PlannedFingerprint:
    return PlannedFingerprint(
        bundle_sha256=fingerprint.bundle_sha256,
        config=fingerprint.config,
        plan_sha256=plan.sha256,
        cut_sha256=plan.cut_sha256,
    )


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


def read_same_run(output_uri: str, plan: Plan) -> RunFile:
    """Read ``run.json`` again, to which another process may have added the settings that it computes with.

    Raises:
        RunMismatchError: The plan in it is not ``plan``: another process has updated it (``segment.retry_errors``).
        StorageError: The store refused the request or failed.
    """
    run = read_run(output_uri)
    if run is None or run.plan != plan:
        raise RunMismatchError(
            f"{output_uri}: another process has updated the plan with fixed images; rerun the same command"
        )
    return run


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
