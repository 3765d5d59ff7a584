"""Binds an output folder to one run: freezes the listing of a new run, or compares it with that of an existing one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from segray.config import find_differences
from segray.errors import RunMismatchError, StorageError
from segray.results.summary import find_error_rows
from segray.runs.fingerprint import build_mismatch_error
from segray.runs.listing import Listing
from segray.runs.plan import Plan, find_lost_files, iterate_plan, save_plan, spool_plan
from segray.runs.run_file import (
    RunFile,
    RunFingerprint,
    get_run_uri,
    read_run,
    warn_of_changed_versions,
    write_if_changed,
)
from segray.runs.written import list_written_fragments
from segray.segmentation.job import SegmentJob
from segray.segmentation.planning.changes import Changes, merge_listings
from segray.segmentation.planning.freeze import JobInputs
from segray.segmentation.planning.spool import make_spool
from segray.storage import create_bytes, write_bytes


@dataclass(frozen=True)
class BoundRun:
    """A run, and the fragments that remain to be processed.

    Attributes:
        record: Content of ``run.json``; marked as running while anything is pending.
        has_truth: Whether any input has ground truth.
        pending: Numbers of the fragments to process, ascending.
        replaced: Pending fragments whose file exists, contains error rows, and is to be overwritten.
        is_complete: Whether an earlier call completed the run and nothing is pending.
    """

    record: RunFile
    has_truth: bool
    pending: list[int]
    replaced: frozenset[int]
    is_complete: bool

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.record.plan


@dataclass(frozen=True)
class _Request:
    """The current call: its job, opened inputs, fingerprint, and the console for progress."""

    job: SegmentJob
    inputs: JobInputs
    fingerprint: RunFingerprint
    console: Console

    def start(self, plan: Plan) -> RunFile:
        return RunFile.start(self.fingerprint, plan, self.job.inputs, self.job.settings)

    def resume(self, recorded: RunFile, plan: Plan) -> RunFile:
        return recorded.resume(plan, self.job.inputs, self.job.settings)

    def require_compatible(self, recorded: RunFile) -> list[str]:
        return recorded.require_compatible(self.fingerprint, self.job.settings, self.job.output_uri)


def bind_run(
    job: SegmentJob, inputs: JobInputs, bundle_sha256: str, check_bundle: Callable[[], object], console: Console
) -> BoundRun:
    """Bind an output folder to a run and determine what is left to do; for a new run, freeze the listing first.

    Args:
        job: The job, with normalized URIs.
        inputs: The opened inputs of the job.
        bundle_sha256: sha256 of the bundle's manifest.
        check_bundle: Raises if the bundle cannot be used; called before anything is written.
        console: For progress and warnings.

    Raises:
        RunMismatchError: The folder belongs to another run; names the differences.
        DataError: The input has no images, or cannot be used.
        StorageError: Environment error (permissions, network, disk).
    """
    output = job.output_uri
    config = {**job.settings.row_settings, "ground_truth": inputs.has_truth}
    request = _Request(job, inputs, RunFingerprint(bundle_sha256=bundle_sha256, config=config), console)
    written = list_written_fragments(output)  # Before run.json, since no fragment is written without it.
    existing = read_run(output)
    errors: dict[int, list[str]] = {}
    if existing is None:
        if written:
            raise RunMismatchError(
                f"{output} holds rows, but no run.json says which run they belong to; choose another --output"
            )
        recorded = _freeze_plan(request, check_bundle)
        plan, written = recorded.plan, list_written_fragments(output)
    else:
        recorded = existing
        request.require_compatible(recorded)
        written = {number: file for number, file in written.items() if number < recorded.plan.num_fragments}
        if job.settings.retry_errors:
            errors = find_error_rows(output, written)
        plan = _compare_listing(request, recorded, errors)
        warn_of_changed_versions(recorded, console)
    pending = (set(range(plan.num_fragments)) - written.keys()) | errors.keys()
    if pending:
        if existing is not None:
            check_bundle()
        _warn_of_mixed_bits(request.require_compatible(recorded), console)
        # Mark the run as running: an interrupted retry must not leave it marked complete with an outdated summary.
        record = request.resume(recorded, plan)
    else:
        record = recorded.model_copy(update={"limits": job.settings.limits})
    if record != recorded:
        write_if_changed(get_run_uri(output), record.format())
    is_complete = record.status == "complete"
    return BoundRun(record, inputs.has_truth, sorted(pending), frozenset(errors), is_complete)


def _warn_of_mixed_bits(changes: list[str], console: Console) -> None:
    """Print the changes of settings that ``segment.allow_mixed`` allows."""
    if changes:
        console.print(
            f"warning: {'; '.join(changes)}; rows written now may differ from earlier ones in their last bits "
            "(segment.allow_mixed)",
            highlight=False,
        )


def _freeze_plan(request: _Request, check_bundle: Callable[[], object]) -> RunFile:
    """List the images of a new run, write its plan and its ``run.json``, and return what ``run.json`` then holds."""
    output = request.job.output_uri
    with make_spool() as folder:
        plan = request.inputs.cut(request.inputs.list_images(folder / "listing", request.console), folder / "plan")
        check_bundle()
        save_plan(output, plan, folder / "plan")
    # The driver that creates run.json binds the folder; a concurrent driver joins the run or is refused. The file is
    # read back in any case, because some stores ignore the condition "only if it does not exist".
    create_bytes(get_run_uri(output), request.start(plan).format())
    recorded = read_run(output)
    assert recorded is not None
    request.require_compatible(recorded)
    if recorded.plan.sha256 != plan.sha256:
        raise build_mismatch_error(output, ["different listing, frozen by another process at the same time"])
    return recorded


def _compare_listing(request: _Request, recorded: RunFile, errors: dict[int, list[str]]) -> Plan:
    """Return the plan of an existing run; images that are retried have the size and entity tags of the new listing.

    ``errors`` holds the URIs of the retried images, which are error rows, by fragment.
    """
    job, output, frozen = request.job, request.job.output_uri, recorded.plan
    if not job.settings.relist:
        then, now = ({**inputs, "bundle": None} for inputs in (recorded.inputs, job.inputs))
        if differences := find_differences(then, now):
            raise build_mismatch_error(output, differences)
        return frozen
    with make_spool() as folder:
        present = request.inputs.list_images(folder / "listing", request.console)
        if present.sha256 == frozen.sha256:
            _restore_plan(request, frozen, present, folder / "plan")
            return frozen
        changes = Changes()
        retryable = {uri for uris in errors.values() for uri in uris}
        merged = merge_listings(iterate_plan(output, frozen), present.read(), retryable, changes)
        (folder / "plan").mkdir()
        plan = spool_plan(merged, folder / "plan")
        if changes.first is not None:
            raise _build_changed_error(request, recorded, changes)
        save_plan(output, plan, folder / "plan")
    write_bytes(get_run_uri(output), request.resume(recorded, plan).format())
    return plan


def _restore_plan(request: _Request, frozen: Plan, listing: Listing, folder: Path) -> None:
    """Write plan files that were lost again, from the same listing.

    Raises:
        StorageError: Other settings divide the listing into other fragments.
    """
    output = request.job.output_uri
    if lost := find_lost_files(output, frozen):
        if request.inputs.cut(listing, folder) != frozen:
            raise StorageError(
                f"{output}: {len(lost)} files of the plan are missing, and cannot be written again with other "
                "fragments; rerun with the segment.fragment_size, fragment_bytes and fragment_px of the first call"
            )
        save_plan(output, frozen, folder)


def _build_changed_error(request: _Request, recorded: RunFile, changes: Changes) -> RunMismatchError:
    differences, remedy = [str(changes)], "to keep the frozen listing, rerun with --set segment.relist=false"
    excluded = recorded.inputs.get("exclude"), request.job.inputs.get("exclude")
    if excluded[0] != excluded[1]:
        differences.append("other runs with --exclude")
    elif excluded[0]:
        remedy = f"if a run with --exclude has segmented more images since, or {remedy}"
    return build_mismatch_error(request.job.output_uri, differences, remedy)
