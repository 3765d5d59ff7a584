"""Binds an output folder to one run: freezes the listing of a new run, or compares it with that of an existing one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from rich.console import Console

from segray.config import find_differences
from segray.errors import DataError, RunMismatchError, StorageError, flatten_message
from segray.results.summary import find_error_rows
from segray.runs.fingerprint import build_mismatch_error
from segray.runs.plan import (
    ListedImage,
    Plan,
    cut_fragments,
    iterate_plan,
    iterate_spooled,
    list_finished_fragments,
    save_plan,
    spool_plan,
)
from segray.runs.run_file import (
    RunFile,
    RunFingerprint,
    get_run_uri,
    read_run,
    warn_of_changed_versions,
    write_if_changed,
)
from segray.segmentation.job import SegmentJob
from segray.segmentation.planning.changes import Changes, merge_listings
from segray.segmentation.planning.inputs import Source, merge_sources
from segray.storage import create_bytes, write_bytes

_STATUS_INTERVAL_IMAGES = 10_000


@dataclass(frozen=True)
class BoundRun:
    """A run, and the fragments that remain to be processed.

    Attributes:
        record: Content of ``run.json`` while the run is in progress.
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
    sources: list[Source]
    fingerprint: RunFingerprint
    console: Console

    def start(self, plan: Plan) -> RunFile:
        return RunFile.start(self.fingerprint, plan, self.job.inputs)


def bind_run(
    job: SegmentJob, sources: list[Source], bundle_sha256: str, check_bundle: Callable[[], object], console: Console
) -> BoundRun:
    """Bind an output folder to a run and determine what is left to do; for a new run, freeze the listing first.

    Args:
        job: The job, with normalized URIs.
        sources: The opened inputs of the job.
        bundle_sha256: sha256 of the bundle's manifest.
        check_bundle: Raises if the bundle cannot be used; called before anything is written.
        console: For progress and warnings.

    Raises:
        RunMismatchError: The folder belongs to another run; names the differences.
        DataError: The input has no images, or cannot be used.
        StorageError: Environment error (permissions, network, disk).
    """
    output = job.output_uri
    has_truth = any(source.has_truth for source in sources)
    config = {**job.settings.row_settings, "ground_truth": has_truth, "device": job.settings.device}
    request = _Request(job, sources, RunFingerprint(bundle_sha256=bundle_sha256, config=config), console)
    finished = list_finished_fragments(output)  # Before run.json, since no fragment is written without it.
    recorded = read_run(output)
    errors: dict[int, list[str]] = {}
    if recorded is None:
        if finished:
            raise RunMismatchError(
                f"{output} holds rows, but no run.json says which run they belong to; choose another --output"
            )
        plan = _freeze_plan(request, check_bundle)
        finished = list_finished_fragments(output)
    else:
        recorded.fingerprint.require_same(request.fingerprint, output)
        finished &= set(range(recorded.plan.num_fragments))
        if job.settings.retry_errors:
            errors = find_error_rows(output, finished)
        plan = _compare_listing(request, recorded, errors)
        warn_of_changed_versions(recorded, console)
    record = request.start(plan)
    pending = (set(range(plan.num_fragments)) - finished) | errors.keys()
    is_complete = recorded is not None and recorded.status == "complete" and not pending
    if recorded is not None and pending:
        check_bundle()
        # Mark the run as running: an interrupted retry must not leave it marked complete with an outdated summary.
        write_if_changed(get_run_uri(output), record.format())
    return BoundRun(record, has_truth, sorted(pending), frozenset(errors), is_complete)


def _freeze_plan(request: _Request, check_bundle: Callable[[], object]) -> Plan:
    """List the images of a new run, and write its plan and its ``run.json``."""
    output = request.job.output_uri
    with _make_spool() as folder:
        plan = _spool_listing(request, Path(folder))
        check_bundle()
        save_plan(output, plan, Path(folder))
    # The driver that creates run.json binds the folder; a concurrent driver joins the run or is refused. The file is
    # read back in any case, because some stores ignore the condition "only if it does not exist".
    create_bytes(get_run_uri(output), request.start(plan).format())
    recorded = read_run(output)
    assert recorded is not None
    recorded.fingerprint.require_same(request.fingerprint, output)
    if recorded.plan != plan:
        raise build_mismatch_error(output, ["different listing, frozen by another process at the same time"])
    return plan


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
    with _make_spool() as folder:
        present_folder, merged_folder = Path(folder, "present"), Path(folder, "merged")
        present = _spool_listing(request, present_folder)
        if present.sha256 == frozen.sha256:
            if present == frozen:
                save_plan(output, frozen, present_folder)  # Restores plan files that were lost.
            return frozen
        changes = Changes()
        retryable = {uri for uris in errors.values() for uri in uris}
        merged = merge_listings(
            iterate_plan(output, frozen), iterate_spooled(present_folder, present), retryable, changes
        )
        merged_folder.mkdir()
        plan = spool_plan(merged, merged_folder)
        if changes.first is not None:
            remedy = "to keep the frozen listing, rerun with --set segment.relist=false"
            raise build_mismatch_error(output, [str(changes)], remedy)
        save_plan(output, plan, merged_folder)
    write_bytes(get_run_uri(output), request.start(plan).format())
    return plan


@contextmanager
def _make_spool() -> Iterator[str]:
    """Yield a temporary local folder for a plan.

    Raises:
        StorageError: The folder cannot be written, for example because the disk is full.
    """
    try:
        with TemporaryDirectory(prefix="segray-plan-") as folder:
            yield folder
    except OSError as error:
        raise StorageError(
            f"cannot write the plan to the temporary folder {gettempdir()}: {flatten_message(error)}; free disk space, "
            "or set TMPDIR to another folder"
        ) from error


def _spool_listing(request: _Request, folder: Path) -> Plan:
    """List the images of the inputs, divide them into fragments, and write the plan to a local folder.

    Raises:
        DataError: There are no images.
    """
    job = request.job
    folder.mkdir(exist_ok=True)
    with request.console.status("listing images") as status:

        def show_progress(images: Iterable[ListedImage]) -> Iterator[ListedImage]:
            for number, image in enumerate(images):
                if number % _STATUS_INTERVAL_IMAGES == 0 and number:
                    status.update(f"listing images: {number:,}")
                yield image

        plan = spool_plan(cut_fragments(show_progress(merge_sources(request.sources)), job.settings), folder)
    if not plan.num_images:
        expected = ", ".join(f"*.{extension}" for extension in job.settings.extensions)
        raise DataError(
            f"no images under {', '.join(job.image_uris)}: expected files named {expected} (segment.extensions)"
        )
    return plan
