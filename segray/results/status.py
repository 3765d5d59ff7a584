"""Progress of a segmentation run, read from its folder only: Ray is not needed, and the run is not affected."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from segray.results.counts import add_errors
from segray.results.saved_counts import load_outcomes
from segray.runs.run_file import require_run
from segray.runs.written import WrittenFragment, list_written_fragments
from segray.storage import normalize_uri

_RATE_WINDOW_S = 600


@dataclass(frozen=True)
class RunStatus:
    """Progress of a run.

    Attributes:
        output_uri: The run folder.
        state: ``complete`` or ``running``; a run that was stopped cannot be told apart from one that is running.
        num_planned: Number of planned images.
        num_done: Number of images that have a row.
        num_fragments: Number of planned fragments.
        num_fragments_done: Number of written fragments.
        rows: Number of rows by error kind; rows without an error are counted under ``ok``.
        images_per_s: Rate over the ten minutes before the last fragment was written; None before the second.
        idle_s: Seconds since the last fragment was written; None if there is none.
    """

    output_uri: str
    state: str
    num_planned: int
    num_done: int
    num_fragments: int
    num_fragments_done: int
    rows: Counter[str]
    images_per_s: float | None
    idle_s: float | None

    @property
    def num_remaining(self) -> int:
        """Images that have no row yet."""
        return self.num_planned - self.num_done


def read_status(output_uri: str) -> RunStatus:
    """Return the progress of the run in a folder.

    Raises:
        MissingFileError: There is no run.
        RunMismatchError: ``run.json`` is not valid.
        StorageError: The store refused the request or failed.
    """
    output = normalize_uri(output_uri)
    run = require_run(output)
    plan = run.plan
    written = list_written_fragments(output, plan.num_fragments)
    outcomes = load_outcomes(output, written)
    errors = add_errors(outcomes)
    num_ok = int(outcomes["num_ok"].to_numpy().sum())
    return RunStatus(
        output_uri=output,
        state=run.status,
        num_planned=plan.num_images,
        num_done=num_ok + errors.total(),
        num_fragments=plan.num_fragments,
        num_fragments_done=len(written),
        rows=Counter({"ok": num_ok}) + errors,
        images_per_s=_compute_rate(outcomes, written),
        idle_s=time.time() - max(file.modified_s for file in written.values()) if written else None,
    )


def _compute_rate(outcomes: pa.Table, written: Mapping[int, WrittenFragment]) -> float | None:
    """Return the images per second of ``RunStatus``."""
    times = sorted((file.modified_s, fragment) for fragment, file in written.items())
    recent = [(modified_s, fragment) for modified_s, fragment in times if modified_s >= times[-1][0] - _RATE_WINDOW_S]
    span_s = recent[-1][0] - recent[0][0] if recent else 0
    if span_s <= 0:
        return None
    later = [fragment for _, fragment in recent[1:]]  # The first one was processed before the span began.
    counts = outcomes.filter(pc.is_in(outcomes["fragment"], pa.array(later, pa.int64())))
    return (int(counts["num_ok"].to_numpy().sum()) + add_errors(counts).total()) / span_s


def print_status(status: RunStatus, console: Console) -> None:
    """Print the progress of a run, one value per line."""
    share = status.num_done / status.num_planned
    lines = {
        "run": f"{status.output_uri} ({'complete' if status.state == 'complete' else 'not complete'})",
        "planned": f"{status.num_planned:,} images in {status.num_fragments:,} fragments",
        "done": f"{status.num_done:,} images ({share:.1%}) in {status.num_fragments_done:,} fragments",
        "ok": f"{status.rows['ok']:,}",
        "errors": _format_errors(status.rows),
        "remaining": f"{status.num_remaining:,} images",
    }
    if status.idle_s is not None and status.state != "complete":
        lines["last written"] = f"{status.idle_s:,.0f} s ago"
    if status.images_per_s is not None:
        lines["rate"] = f"{status.images_per_s:,.1f} images/s"
        if status.num_remaining:
            lines["rate"] += f", {status.num_remaining / status.images_per_s / 60:,.1f} min remaining at this rate"
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table, highlight=False)


def _format_errors(rows: Counter[str]) -> str:
    kinds = {kind: count for kind, count in sorted(rows.items()) if kind != "ok"}
    total = sum(kinds.values())
    return f"{total:,}" + (f" ({', '.join(f'{count:,} {kind}' for kind, count in kinds.items())})" if kinds else "")
