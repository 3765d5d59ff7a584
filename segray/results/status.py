"""Progress of a segmentation run, read from its folder only: Ray is not needed, and the run is not affected."""

import time
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from segray.errors import MissingFileError
from segray.results.summary import count_rows
from segray.runs.plan import FRAGMENT_NAME, count_images
from segray.runs.run_file import require_run
from segray.storage import get_file_name, join_uri, list_files, normalize_uri

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
    images = count_images(output, plan)
    written = {}
    try:
        for file in list_files(join_uri(output, "images")):
            match = FRAGMENT_NAME.fullmatch(get_file_name(file.uri))
            if match and int(match[1]) < plan.num_fragments:
                written[int(match[1])] = file.modified_s
    except MissingFileError:
        pass  # No fragment has been written yet.
    times = sorted((modified_s, fragment) for fragment, modified_s in written.items())
    recent = [(modified_s, fragment) for modified_s, fragment in times if modified_s >= times[-1][0] - _RATE_WINDOW_S]
    span_s = recent[-1][0] - recent[0][0] if recent else 0
    rate = sum(int(images[fragment]) for _, fragment in recent[1:]) / span_s if span_s > 0 else None
    return RunStatus(
        output_uri=output,
        state=run.status,
        num_planned=plan.num_images,
        num_done=int(images[sorted(written)].sum()),
        num_fragments=plan.num_fragments,
        num_fragments_done=len(written),
        rows=count_rows(output, sorted(written)),
        images_per_s=rate,
        idle_s=time.time() - times[-1][0] if times else None,
    )


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
