"""End-to-end tests on Ray: every planned image has one row with the correct mask, even if other images are unusable."""

import io
import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet as pq
from rich.console import Console
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_confusion_matrix

from segray.data.images import decode_image, resize_image
from segray.models.bundle import load_bundle
from segray.schema import IMAGES_SCHEMA, PLAN_SCHEMA, SUMMARY_SCHEMA
from segray.segmentation.driver import print_outcome
from tests.conftest import PET_CLASSES, SHAPE_SIZE
from tests.segmented import NUM_IMAGES, SETTINGS, read_rows, segment

pytestmark = pytest.mark.usefixtures("ray_session")
IGNORED = -1  # Raw mask values start at 1, and 0 is ignored.


def test_every_planned_image_has_one_row_of_the_documented_schema(finished: Path, bucket: Path) -> None:
    rows = read_rows(finished)
    assert [row["uri"] for row in rows] == sorted(str(path) for path in bucket.rglob("images/**/*.png"))
    assert {row["status"] for row in rows} == {"ok"}
    for path in finished.glob("images/*.parquet"):
        assert pq.read_schema(path).equals(IMAGES_SCHEMA)
    plan = pa.concat_tables([pq.read_table(path) for path in sorted(finished.glob("plan/*.parquet"))])
    assert plan.schema.equals(PLAN_SCHEMA)
    assert plan["fragment"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 2
    assert pq.read_schema(finished / "summary.parquet").equals(SUMMARY_SCHEMA)
    run = json.loads((finished / "run.json").read_text())
    assert (run["format_version"], run["status"]) == (2, "complete")
    assert run["counts"] == {"planned": NUM_IMAGES, "fragments": 3, "ok": NUM_IMAGES, "errors": {}}


def predict(bundle_dir: Path, uri: str) -> npt.NDArray[np.float64]:
    """Return softmax probabilities (C, H, W) of one image at its own size, computed in plain torch."""
    bundle = load_bundle(str(bundle_dir))
    image = decode_image(Path(uri).read_bytes())
    pixels = torch.from_numpy(np.array(resize_image(image, bundle.manifest.image_size)))[None]
    with torch.no_grad():
        logits = bundle.model(bundle.manifest.preprocessing.apply(pixels))
    resized = functional.interpolate(logits, size=image.shape[:2], mode="bilinear", align_corners=False)
    return resized[0].double().softmax(0).numpy()


def test_masks_and_statistics_equal_plain_torch(finished: Path, bundle_dir: Path) -> None:
    for row in read_rows(finished):
        probability = predict(bundle_dir, row["uri"])
        mask = np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
        expected = probability.argmax(0)
        top_two = np.sort(probability, axis=0)[-2:]
        certain = top_two[1] - top_two[0] > 1e-4  # another batch size may change the last bits
        assert certain.mean() > 0.99
        np.testing.assert_array_equal(mask[certain], expected[certain])
        assert row["pixel_count"] == np.bincount(mask.ravel(), minlength=3).tolist()
        assert row["entropy"] == pytest.approx(-(probability * np.log(probability)).sum(0).mean(), rel=1e-4)
        for index, confidence in enumerate(row["mean_confidence"]):
            here = probability.max(0)[mask == index]
            assert (confidence is None) == (here.size == 0)
            assert confidence is None or confidence == pytest.approx(here.mean(), rel=1e-4)


def test_the_summary_equals_scores_computed_from_the_written_masks(finished: Path) -> None:
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    brute = np.zeros((3, 3), np.int64)
    images = read_rows(finished)
    for row in images:
        truth = np.asarray(Image.open(row["uri"].replace("/images/", "/masks/"))).astype(np.int64) - 1
        mask = np.frombuffer(row["mask"], np.uint8).reshape(truth.shape).astype(np.int64)
        assert (truth == IGNORED).any()
        np.add.at(brute, (truth[truth != IGNORED], mask[truth != IGNORED]), 1)
        counts = multiclass_confusion_matrix(torch.from_numpy(mask), torch.from_numpy(truth), 3, ignore_index=IGNORED)
        confusion += counts
        hits = counts.diagonal().tolist()
        unions = (counts.sum(0) + counts.sum(1) - counts.diagonal()).tolist()
        assert row["tp_px"] == hits
        for iou, hit, union in zip(row["iou"], hits, unions, strict=True):
            assert iou == (None if union == 0 else pytest.approx(hit / union, abs=1e-9))
    np.testing.assert_array_equal(confusion.numpy(), brute)
    tp = np.diagonal(brute)
    summary = pq.read_table(finished / "summary.parquet").to_pylist()
    for index, row in enumerate(summary):
        fp, fn = brute[:, index].sum() - tp[index], brute[index].sum() - tp[index]
        assert row["class_name"] == PET_CLASSES.names[index]
        assert (row["tp_px"], row["fp_px"], row["fn_px"]) == (tp[index], fp, fn)
        assert row["pixel_count"] == sum(image["pixel_count"][index] for image in images)
        assert row["pixel_count"] > brute[:, index].sum()  # ignored pixels are segmented, but not scored
        assert row["dataset_iou"] == pytest.approx(tp[index] / (tp[index] + fp + fn), abs=1e-9)
        assert row["dataset_dice"] == pytest.approx(2 * tp[index] / (2 * tp[index] + fp + fn), abs=1e-9)
    for index, row in enumerate(summary):
        defined = [image["iou"][index] for image in images if image["iou"][index] is not None]
        assert row["mean_image_iou"] == pytest.approx(np.mean(defined), abs=1e-9)
        assert row["image_count"] == sum(image["pixel_count"][index] > 0 for image in images)


def test_unusable_images_are_error_rows_and_all_other_rows_are_bit_identical(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path
) -> None:
    poisoned = Path(shutil.copytree(bucket, tmp_path / "bucket"))
    names = sorted(path.relative_to(poisoned / "images") for path in poisoned.rglob("images/**/*.png"))
    truncated, empty, unmasked, mismatched = names[0], names[3], names[5], names[8]
    content = (poisoned / "images" / truncated).read_bytes()
    (poisoned / "images" / truncated).write_bytes(content[: len(content) // 2])
    (poisoned / "images" / empty).write_bytes(b"")
    (poisoned / "masks" / unmasked).unlink()
    Image.new("L", (5, 5), 1).save(poisoned / "masks" / mismatched)
    outcome = segment(bundle_dir, poisoned, tmp_path / "run")
    expected = {truncated: "truncated", empty: "unreadable", unmasked: "mask_missing", mismatched: "mask_mismatch"}
    assert outcome.errors == dict.fromkeys(expected.values(), 1)
    whole = {row["uri"].removeprefix(f"{bucket}/images/"): row for row in read_rows(finished)}
    for row in read_rows(tmp_path / "run"):
        name = row.pop("uri").removeprefix(f"{poisoned}/images/")
        if Path(name) in expected:
            assert row["error_kind"] == expected[Path(name)]
            assert row["error_message"]
            assert row["mask"] is None
            assert row["pixel_count"] is None
        else:
            assert row == {key: value for key, value in whole[name].items() if key != "uri"}


def test_png_masks_equal_raw_masks_and_scores_are_null_without_ground_truth(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"mask_encoding": "png", "num_predictors": 2})
    segment(bundle_dir, bucket, tmp_path, masks=False, settings=settings)
    for raw, png in zip(read_rows(finished), read_rows(tmp_path), strict=True):
        image = Image.open(io.BytesIO(png["mask"]))
        assert image.mode == "P"
        assert np.asarray(image).tobytes() == raw["mask"]
        assert (png["mask_encoding"], raw["mask_encoding"]) == ("png", "raw")
        assert png["tp_px"] is None
        assert png["iou"] is None
    summary = pq.read_table(tmp_path / "summary.parquet").to_pylist()
    assert {row["dataset_iou"] for row in summary} == {None}
    assert {row["tp_px"] for row in summary} == {None}
    assert sum(row["pixel_count"] for row in summary) > 0


def test_pandas_and_duckdb_read_the_run_folder_as_documented(finished: Path) -> None:
    frame = pd.read_parquet(finished / "images")
    row = frame.iloc[0]
    mask = np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
    assert np.bincount(mask.ravel(), minlength=3).tolist() == list(row["pixel_count"])
    query = f"select status, count(*), sum(octet_length(mask)) from '{finished}/images/*.parquet' group by status"
    assert duckdb.connect().execute(query).fetchall() == [("ok", NUM_IMAGES, int(frame["mask"].map(len).sum()))]


def test_the_report_and_the_printed_summary_show_the_scores(finished: Path, bundle_dir: Path, bucket: Path) -> None:
    html = (finished / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3  # two plots and one comparison picture
    outcome = segment(bundle_dir, bucket, finished)
    printed = io.StringIO()
    print_outcome(outcome, Console(file=printed, width=200))
    for row in outcome.summary.to_pylist():
        assert f"{row['dataset_iou']:.4f}" in html
        assert f"{row['dataset_iou']:.4f}" in printed.getvalue()
    assert f"{NUM_IMAGES} images segmented, 0 error rows" in printed.getvalue()


def test_the_fixture_images_have_different_sizes_from_the_model_input(finished: Path) -> None:
    sizes = {(row["height"], row["width"]) for row in read_rows(finished)}
    assert len(sizes) == NUM_IMAGES
    assert (SHAPE_SIZE, SHAPE_SIZE) not in sizes
