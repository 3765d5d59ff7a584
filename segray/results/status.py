"""``segray status``: how far a run is, from what lies in its folder. It asks no Ray, and disturbs nobody."""

import time
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from segray.errors import MissingFileError
from segray.results.summary import count_rows
from segray.runs.plan import FRAGMENT_NAME, count_images
from segray.runs.run_file import get_plan, read_run
from segray.storage import get_file_name, join_uri, list_files, normalize_uri

_RATE_WINDOW_S = 600


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        state: ``running`` (or stopped: nobody can tell from the folder) or ``complete``.
        rows: Rows by error kind, and under ``ok`` the others.
        images_per_s: Over the last ten minutes in which fragments were written; None of fewer than two fragments.
        idle_s: Since the last fragment was written; None if there is none.
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
    """Look at a run folder.

    Raises:
        MissingFileError: There is no run.
        StorageError: The store refused or failed.
    """
    output = normalize_uri(output_uri)
    run = read_run(output)
    if run is None:
        raise MissingFileError(f"no run at {output}: there is no run.json; give the --output of a segray segment")
    plan = get_plan(run)
    images = count_images(output, plan)
    written = {}
    try:
        for file in list_files(join_uri(output, "images")):
            match = FRAGMENT_NAME.fullmatch(get_file_name(file.uri))
            if match and int(match[1]) < plan.num_fragments:
                written[int(match[1])] = file.modified_s
    except MissingFileError:
        pass  # none yet
    times = sorted((modified_s, fragment) for fragment, modified_s in written.items())
    recent = [(at, fragment) for at, fragment in times if at >= times[-1][0] - _RATE_WINDOW_S]
    span_s = recent[-1][0] - recent[0][0] if recent else 0
    rate = sum(int(images[fragment]) for _, fragment in recent[1:]) / span_s if span_s > 0 else None
    return RunStatus(
        output_uri=output,
        state=run["status"],
        num_planned=plan.num_images,
        num_done=int(images[sorted(written)].sum()),
        num_fragments=plan.num_fragments,
        num_fragments_done=len(written),
        rows=count_rows(output, sorted(written)),
        images_per_s=rate,
        idle_s=time.time() - times[-1][0] if times else None,
    )


def print_status(status: RunStatus, console: Console) -> None:
    """Print a run's status, one line each."""
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
            lines["rate"] += f", {status.num_remaining / status.images_per_s / 60:,.1f} min to go at that rate"
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table, highlight=False)


def _format_errors(rows: Counter[str]) -> str:
    kinds = {kind: count for kind, count in sorted(rows.items()) if kind != "ok"}
    total = sum(kinds.values())
    return f"{total:,}" + (f" ({', '.join(f'{count:,} {kind}' for kind, count in kinds.items())})" if kinds else "")
