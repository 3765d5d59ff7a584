"""Builds ``report.html``: one self-contained file with the summary, example pictures and error rows of a run."""

import base64
from itertools import chain, islice
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc

from segray.data.classes import ClassMap
from segray.data.samples import read_image, read_truth
from segray.errors import ImageFault, StorageError
from segray.plots import Panel, draw_class_bars, draw_comparison
from segray.results.masks import load_mask
from segray.results.saved_counts import read_fragments
from segray.results.summary import FinishedRun, format_cell, list_fragments_with_errors
from segray.runs.plan import get_fragment_uri, load_fragment
from segray.storage import ParquetReader, get_file_name, read_columns

_MAX_ERRORS = 1000
_MAX_PICTURE_SIDE_PX = 640

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("segray.results", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def build_report(run: FinishedRun, num_images: int) -> bytes:
    """Return the report of a run as an HTML file, with pictures of ``num_images`` images spread over the run."""
    tally, summary, classes = run.tally, run.summary, run.classes
    panels = _load_panels(run, num_images) if num_images else []
    num_px = max(1, int(tally.sums["pixel_count"].sum()))
    plots = [("share of pixels", [float(count) / num_px for count in tally.sums["pixel_count"]])]
    if tally.has_truth:
        plots.append(("IoU over the data set", summary["dataset_iou"].to_pylist()))
    num_errors = sum(tally.errors.values())
    rows = summary.to_pylist()
    html = _TEMPLATES.get_template("report.html.j2").render(
        output_uri=run.output_uri,
        num_images=tally.num_ok + num_errors,
        num_ok=tally.num_ok,
        num_errors=num_errors,
        columns=[name for name in summary.column_names[1:] if any(row[name] is not None for row in rows)],
        summary=[{name: format_cell(value) for name, value in row.items()} for row in rows],
        plots=[{"title": title, "png": _inline(draw_class_bars(values, classes, title))} for title, values in plots],
        picture=_inline(draw_comparison(panels, classes)) if panels else None,
        errors=_read_errors(run),
        error_counts=sorted(tally.errors.items()),
    )
    return html.encode()


def _inline(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _read_errors(run: FinishedRun) -> list[dict[str, Any]]:
    """Return the first error rows of a run; only fragments that have any are read."""
    tables = read_fragments(
        run.output_uri, list_fragments_with_errors(run.counts), ["uri", "error_kind", "error_message"]
    )
    rows = chain.from_iterable(table.filter(pc.is_valid(table["error_kind"])).to_pylist() for table in tables)
    return list(islice(rows, _MAX_ERRORS))


def _load_panels(run: FinishedRun, num_images: int) -> list[Panel]:
    """Return pictures from fragments evenly spaced over the run."""
    num_fragments = run.plan.num_fragments
    chosen = sorted({int(part) for part in np.linspace(0, num_fragments - 1, min(num_fragments, num_images))})
    share = -(-num_images // len(chosen))
    panels: list[Panel] = []
    for fragment in chosen:
        uri = get_fragment_uri(run.output_uri, fragment)
        status = read_columns(uri, ["status"])["status"]
        usable = pc.indices_nonzero(pc.equal(status, "ok")).to_pylist()
        picked = usable[:: max(1, len(usable) // max(1, share))][: min(share, num_images - len(panels))]
        images = load_fragment(run.output_uri, run.plan.cut_sha256, fragment).to_pylist() if picked else []
        planned = {image["uri"]: image for image in images}
        for index in picked:
            row = ParquetReader(uri).read_row(index)
            if panel := _load_panel(row, planned[row["uri"]], run.classes):
                panels.append(panel)
    return panels


def _load_panel(row: dict[str, Any], planned: dict[str, Any], classes: ClassMap) -> Panel | None:
    """Return the picture of an ``ok`` row, or None if its image can no longer be read."""
    mask_uri = planned["mask_uri"]
    try:
        image = read_image(row["uri"], row["height"] * row["width"], planned["etag"])
        truth = read_truth(mask_uri, image.shape[:2], classes, etag=planned["mask_etag"]) if mask_uri else None
    except (ImageFault, StorageError):  # The image has changed since, or the driver cannot read it.
        return None
    step = -(-max(image.shape[:2]) // _MAX_PICTURE_SIDE_PX)
    mask = load_mask(row)
    truth = None if truth is None else truth[::step, ::step]
    return Panel(get_file_name(row["uri"]), image[::step, ::step], truth, mask[::step, ::step])
