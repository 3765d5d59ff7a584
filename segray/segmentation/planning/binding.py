"""Binds an output folder to one run: freezes the listing, or holds that of today against the frozen one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from rich.console import Console

from segray.config import find_differences
from segray.errors import DataError, RunMismatchError, StorageError, flatten_message
from segray.results.summary import find_error_rows
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
    Fingerprint,
    format_run,
    get_plan,
    get_run_uri,
    read_run,
    refuse,
    require_same_model,
    warn_of_other_versions,
    write_if_changed,
)
from segray.segmentation.job import SegmentJob
from segray.segmentation.planning.changes import Changes, merge_listings
from segray.segmentation.planning.inputs import Source, merge_sources
from segray.storage import create_bytes, write_bytes

_SHOW_EVERY = 10_000  # images


@dataclass(frozen=True)
class BoundRun:
    """An output folder and the run it belongs to.

    Attributes:
        pending: Fragments that are to be made, in order.
        replaced: Those of them that are there already, with error rows.
        is_complete: Whether a call before this one has finished it, and nothing is to be made.
    """

    fingerprint: Fingerprint
    plan: Plan
    has_truth: bool
    pending: list[int]
    replaced: frozenset[int]
    is_complete: bool


def bind_run(
    job: SegmentJob, sources: list[Source], bundle_sha256: str, require_bundle: Callable[[], object], console: Console
) -> BoundRun:
    """Find out what is to be made in a folder; in a new one, freeze the listing first.

    ``sources`` are what the job's image URIs stand for. ``require_bundle`` is called before the first thing is written,
    and raises if the bundle is of no use.

    Raises:
        RunMismatchError: The folder belongs to another run; names what differs.
        SegrayError: The input is unusable, or the world failed.
    """
    output = job.output_uri
    has_truth = any(source.has_truth for source in sources)
    config = {**job.settings.of_rows, "ground_truth": has_truth, "device": job.settings.device}
    fingerprint = Fingerprint(bundle_sha256, config)
    finished = list_finished_fragments(output)  # before run.json, without which no fragment is ever written
    run = read_run(output)
    errors: dict[int, list[str]] = {}
    if run is None:
        if finished:
            raise RunMismatchError(f"{output} holds rows but no run.json to say of what; choose another --output")
        plan = _freeze(job, sources, fingerprint, require_bundle, console)
        finished = list_finished_fragments(output)
    else:
        require_same_model(run, bundle_sha256, config, output)
        finished &= set(range(get_plan(run).num_fragments))
        if job.settings.retry_errors:
            errors = find_error_rows(output, finished)
        plan = _compare(job, run, sources, fingerprint, errors, console)
        warn_of_other_versions(run, console)
    pending = (set(range(plan.num_fragments)) - finished) | errors.keys()
    is_complete = run is not None and run["status"] == "complete" and not pending
    if run is not None and pending:
        require_bundle()
        # else a retry that is cut off would leave a summary of the rows before it, and call that complete
        write_if_changed(get_run_uri(output), format_run(fingerprint, plan, job.inputs, "running"))
    return BoundRun(fingerprint, plan, has_truth, sorted(pending), frozenset(errors), is_complete)


def _freeze(
    job: SegmentJob,
    sources: list[Source],
    fingerprint: Fingerprint,
    require_bundle: Callable[[], object],
    console: Console,
) -> Plan:
    with _make_spool() as folder:
        plan = _list(job, sources, Path(folder), console)
        require_bundle()
        save_plan(job.output_uri, plan, Path(folder))
    # Whoever creates run.json has bound the folder; another driver that comes second joins the run or is refused. It is
    # read back in any case: there are stores that take no notice of the condition "if there is none".
    create_bytes(get_run_uri(job.output_uri), format_run(fingerprint, plan, job.inputs, "running"))
    theirs = read_run(job.output_uri)
    assert theirs is not None
    require_same_model(theirs, fingerprint.bundle_sha256, fingerprint.config, job.output_uri)
    if get_plan(theirs) != plan:
        raise refuse(job.output_uri, "another listing, which another call froze in this moment")
    return plan


def _compare(
    job: SegmentJob,
    run: dict[str, Any],
    sources: list[Source],
    fingerprint: Fingerprint,
    errors: dict[int, list[str]],
    console: Console,
) -> Plan:
    """Return the run's plan, brought up to date for its error rows if these are to be made again."""
    output = job.output_uri
    frozen = get_plan(run)
    if not job.settings.relist:
        theirs, mine = ({**inputs, "bundle": None} for inputs in (run["inputs"], job.inputs))
        if differences := find_differences(theirs, mine):
            raise refuse(output, "; ".join(differences))
        return frozen
    with _make_spool() as folder:
        present_folder, merged_folder = Path(folder, "present"), Path(folder, "merged")
        present = _list(job, sources, present_folder, console)
        if present.sha256 == frozen.sha256:
            if present == frozen:
                save_plan(output, frozen, present_folder)  # should any of it have been lost
            return frozen
        changes = Changes()
        mendable = {uri for uris in errors.values() for uri in uris}
        merged = merge_listings(
            iterate_plan(output, frozen), iterate_spooled(present_folder, present), mendable, changes
        )
        merged_folder.mkdir()
        plan = spool_plan(merged, merged_folder)
        if changes.first is not None:
            raise refuse(output, str(changes), "to go on with the frozen listing --set segment.relist=false, or ")
        save_plan(output, plan, merged_folder)
    write_bytes(get_run_uri(output), format_run(fingerprint, plan, job.inputs, "running"))
    return plan


@contextmanager
def _make_spool() -> Iterator[str]:
    """Yield a folder of this machine for a plan to pass through."""
    try:
        with TemporaryDirectory(prefix="segray-plan-") as folder:
            yield folder
    except OSError as error:
        raise StorageError(
            f"cannot write the plan to {gettempdir()} on its way: {flatten_message(error)}; free some space, or name "
            "another folder in TMPDIR"
        ) from error


def _list(job: SegmentJob, sources: list[Source], folder: Path, console: Console) -> Plan:
    folder.mkdir(exist_ok=True)
    with console.status("listing images") as status:

        def watch(images: Iterable[ListedImage]) -> Iterator[ListedImage]:
            for number, image in enumerate(images):
                if number % _SHOW_EVERY == 0 and number:
                    status.update(f"listing images: {number:,}")
                yield image

        plan = spool_plan(cut_fragments(watch(merge_sources(sources)), job.settings), folder)
    if not plan.num_images:
        expected = ", ".join(f"*.{extension}" for extension in job.settings.extensions)
        raise DataError(
            f"no images under {', '.join(job.image_uris)}: expected files named {expected} (segment.extensions)"
        )
    return plan
