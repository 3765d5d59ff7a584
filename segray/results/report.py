"""``report.html``: what a person looks at first. One file, pictures inside, nothing fetched from elsewhere."""

import base64
import io
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from segray.data.classes import ClassMap
from segray.data.samples import read_image, read_truth
from segray.errors import ImageFault, StorageError
from segray.plots import Panel, draw_class_bars, draw_comparison
from segray.results.summary import Tally, format_cell, read_rows
from segray.runs.plan import Plan, load_fragment
from segray.storage import get_file_name

_NUM_FRAGMENTS = 6  # at least, to look for errors in
_NUM_ERRORS = 20
_MAX_PICTURE_SIDE_PX = 640

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("segray.results", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def build_report(
    output_uri: str, plan: Plan, summary: pa.Table, tally: Tally, classes: ClassMap, num_images: int
) -> bytes:
    """Return the report of a finished run as an HTML file, with pictures of ``num_images`` from all over it."""
    panels, errors = _pick_rows(output_uri, plan, classes, num_images)
    num_px = max(1, int(tally.sums["pixel_count"].sum()))
    plots = [("share of pixels", [float(count) / num_px for count in tally.sums["pixel_count"]])]
    if tally.has_truth:
        plots.append(("IoU over the data set", summary["dataset_iou"].to_pylist()))
    num_errors = sum(tally.errors.values())
    rows = summary.to_pylist()
    html = _TEMPLATES.get_template("report.html.j2").render(
        output_uri=output_uri,
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


def _pick_rows(
    output_uri: str, plan: Plan, classes: ClassMap, num_images: int
) -> tuple[list[Panel], list[dict[str, Any]]]:
    """Return pictures and errors from fragments evenly spaced over the run."""
    num_chosen = min(plan.num_fragments, max(num_images, _NUM_FRAGMENTS))
    chosen = sorted({int(fragment) for fragment in np.linspace(0, plan.num_fragments - 1, num_chosen)})
    share = -(-num_images // len(chosen))
    panels: list[Panel] = []
    errors: list[dict[str, Any]] = []
    for fragment in chosen:
        rows = read_rows(output_uri, fragment).to_pylist()
        errors += [row for row in rows if row["status"] == "error"]
        usable = [row for row in rows if row["status"] == "ok"]
        planned = {image["uri"]: image for image in load_fragment(output_uri, plan.cut_sha256, fragment).to_pylist()}
        for row in usable[:: max(1, len(usable) // max(1, share))][: min(share, num_images - len(panels))]:
            panel = _load_panel(row, planned[row["uri"]], classes)
            if panel:
                panels.append(panel)
    return panels, errors[:_NUM_ERRORS]


def _load_panel(row: dict[str, Any], planned: dict[str, Any], classes: ClassMap) -> Panel | None:
    mask_uri = planned["mask_uri"]
    try:
        image = read_image(row["uri"], row["height"] * row["width"], planned["etag"])
        truth = read_truth(mask_uri, image.shape[:2], classes, etag=planned["mask_etag"]) if mask_uri else None
    except (ImageFault, StorageError):  # changed since, or not to be seen from here: the rows stand without a picture
        return None
    step = -(-max(image.shape[:2]) // _MAX_PICTURE_SIDE_PX)
    mask = load_mask(row, classes)
    truth = None if truth is None else truth[::step, ::step]
    return Panel(get_file_name(row["uri"]), image[::step, ::step], truth, mask[::step, ::step])


def load_mask(row: dict[str, Any], classes: ClassMap) -> npt.NDArray[np.integer]:
    """Return the mask of an ``ok`` row, (height, width) class indices, in whichever encoding it is stored."""
    if row["mask_encoding"] == "png":
        return np.asarray(Image.open(io.BytesIO(row["mask"]), formats=("PNG",)))
    return np.frombuffer(row["mask"], classes.mask_dtype).reshape(row["height"], row["width"])
