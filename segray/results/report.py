"""Builds ``report.html``: one self-contained file with the summary, example pictures and error rows of a run."""

import base64
from typing import Any

import jinja2
import numpy as np

from segray.data.classes import ClassMap
from segray.data.samples import read_image, read_truth
from segray.errors import ImageFault, StorageError
from segray.plots import Panel, draw_class_bars, draw_comparison
from segray.results.masks import load_mask
from segray.results.summary import FinishedRun, format_cell, read_rows
from segray.runs.plan import load_fragment
from segray.storage import get_file_name

_MIN_FRAGMENTS = 6  # minimum number of fragments that are searched for error rows
_MAX_ERRORS = 20
_MAX_PICTURE_SIDE_PX = 640

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("segray.results", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def build_report(run: FinishedRun, num_images: int) -> bytes:
    """Return the report of a run as an HTML file, with pictures of ``num_images`` images spread over the run."""
    tally, summary, classes = run.tally, run.summary, run.classes
    panels, errors = _pick_rows(run, num_images)
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
        errors=errors,
        error_counts=sorted(tally.errors.items()),
    )
    return html.encode()


def _inline(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _pick_rows(run: FinishedRun, num_images: int) -> tuple[list[Panel], list[dict[str, Any]]]:
    """Return pictures and error rows from fragments evenly spaced over the run."""
    num_fragments = run.plan.num_fragments
    num_chosen = min(num_fragments, max(num_images, _MIN_FRAGMENTS))
    chosen = sorted({int(fragment) for fragment in np.linspace(0, num_fragments - 1, num_chosen)})
    share = -(-num_images // len(chosen))
    panels: list[Panel] = []
    errors: list[dict[str, Any]] = []
    for fragment in chosen:
        rows = read_rows(run.output_uri, fragment).to_pylist()
        errors += [row for row in rows if row["status"] == "error"]
        usable = [row for row in rows if row["status"] == "ok"]
        images = load_fragment(run.output_uri, run.plan.cut_sha256, fragment).to_pylist()
        planned = {image["uri"]: image for image in images}
        for row in usable[:: max(1, len(usable) // max(1, share))][: min(share, num_images - len(panels))]:
            panel = _load_panel(row, planned[row["uri"]], run.classes)
            if panel:
                panels.append(panel)
    return panels, errors[:_MAX_ERRORS]


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
