"""Binds an output folder to one run: freezes the listing, or holds that of today against the frozen one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from segray.config import find_differences
from segray.errors import DataError, RunMismatchError
from segray.segment.changes import Changes, merge_listings
from segray.segment.inputs import ListedImage, Source, merge_sources
from segray.segment.job import SegmentJob
from segray.segment.plan import (
    Plan,
    cut_fragments,
    iterate_plan,
    iterate_spooled,
    list_finished_fragments,
    remove_other_plans,
    save_plan,
    spool_plan,
)
from segray.segment.run import (
    Fingerprint,
    format_run,
    get_plan,
    get_run_uri,
    read_run,
    refuse,
    require_same_model,
)
from segray.segment.summary import find_error_rows
from segray.storage import create_bytes, write_bytes

_SHOW_EVERY = 10_000  # images


@dataclass(frozen=True)
class BoundRun:
    """An output folder and the run it belongs to.

    Attributes:
        pending: Fragments that are to be made, in order.
        is_complete: Whether a call before this one has finished it.
    """

    fingerprint: Fingerprint
    plan: Plan
    has_truth: bool
    pending: list[int]
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
    fingerprint = Fingerprint(bundle_sha256, {**job.settings.of_rows, "ground_truth": has_truth})
    run = read_run(output)
    finished = list_finished_fragments(output)
    if run is None:
        if finished:
            raise RunMismatchError(f"{output} holds rows but no run.json to say of what; choose another --output")
        plan = _freeze(job, sources, fingerprint, require_bundle, console)
        pending, is_complete = set(range(plan.num_fragments)) - list_finished_fragments(output), False
    else:
        require_same_model(run, bundle_sha256, fingerprint.config, output)
        errors = find_error_rows(output, finished) if job.settings.retry_errors else {}
        plan = _compare(job, run, sources, fingerprint, errors, console)
        pending = (set(range(plan.num_fragments)) - finished) | errors.keys()
        is_complete = run["status"] == "complete"
        if pending:
            require_bundle()
    remove_other_plans(output, plan)
    return BoundRun(fingerprint, plan, has_truth, sorted(pending), is_complete)


def _freeze(
    job: SegmentJob,
    sources: list[Source],
    fingerprint: Fingerprint,
    require_bundle: Callable[[], object],
    console: Console,
) -> Plan:
    with TemporaryDirectory(prefix="segray-plan-") as folder:
        plan = _list(job, sources, Path(folder), console)
        require_bundle()
        save_plan(job.output_uri, plan, Path(folder))
    # whoever creates run.json has bound the folder; another driver that comes second joins the run or is refused
    if not create_bytes(get_run_uri(job.output_uri), format_run(fingerprint, plan, job.inputs, "running")):
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
    with TemporaryDirectory(prefix="segray-plan-") as folder:
        present_folder, merged_folder = Path(folder, "present"), Path(folder, "merged")
        present = _list(job, sources, present_folder, console)
        if present.sha256 == frozen.sha256:
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
