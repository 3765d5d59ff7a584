"""The predict stage without Ray: fragments with error rows, classes that are never predicted, a replaced bundle."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segray.config import SegmentSettings
from segray.errors import BundleError, ClusterError
from segray.models.bundle import load_bundle
from segray.segmentation.profile import Stopwatch
from segray.segmentation.stages.decode import DecodedImage, pack_decoded
from segray.segmentation.stages.ledger import PREDICT
from segray.segmentation.stages.predictor import FragmentPredictor
from tests.conftest import PET_CLASSES, SHAPE_SIZE, save_pet_bundle
from tests.segmentation.local_ledger import LocalLedger
from tests.segmented import make_pipeline_job

SETTINGS = SegmentSettings(batch_size=2, precision="fp32")
NEVER = 2  # The model of the fixture never predicts this class.


@pytest.fixture(scope="module")
def bundle(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never")
    weights = load_bundle(str(bundle_dir)).model.state_dict()
    weights["network.head.bias"][NEVER] = -1e6
    save_pet_bundle(folder, weights)
    return folder


def predict(bundle: Path, decoded: list[DecodedImage], settings: SegmentSettings = SETTINGS) -> list[dict[str, Any]]:
    predictor = FragmentPredictor(make_pipeline_job(bundle, settings), 1, LocalLedger(PREDICT))
    rows: list[dict[str, Any]] = predictor(pack_decoded(7, decoded, Stopwatch()))["rows"][0].as_py()
    return rows


def make_image(uri: str, truth: int | None = None) -> DecodedImage:
    pixels = np.random.default_rng(len(uri)).integers(0, 256, (SHAPE_SIZE, SHAPE_SIZE, 3), np.uint8)
    height, width = 30, 20 + len(uri)
    truth_hw = None if truth is None else np.full((height, width), truth, np.uint8)
    return DecodedImage({"uri": uri, "height": height, "width": width}, pixels, truth_hw)


def test_error_rows_keep_their_position_and_get_no_mask(bundle: Path) -> None:
    fault = DecodedImage({"uri": "b", "error_kind": "truncated", "error_message": "short"})
    rows = predict(bundle, [fault, make_image("cc"), fault, make_image("dddd"), make_image("fffff"), fault])
    assert [row["uri"] for row in rows] == ["b", "cc", "b", "dddd", "fffff", "b"]
    assert [row["status"] for row in rows] == ["error", "ok", "error", "ok", "ok", "error"]
    (alone,) = predict(bundle, [make_image("fffff")])
    assert rows[4] == alone
    usable = [row for row in rows if row["status"] == "ok"]
    assert [len(row["mask"]) for row in usable] == [row["height"] * row["width"] for row in usable]
    assert rows[1]["mask"] != alone["mask"]
    assert {row["mask"] for row in rows if row["status"] == "error"} == {None}


def test_an_absent_class_has_null_scores_and_confidence(bundle: Path) -> None:
    (row,) = predict(bundle, [make_image("a", truth=0)])
    assert row["pixel_count"][NEVER] == 0
    assert row["mean_confidence"][NEVER] is None
    assert sum(row["pixel_count"]) == row["height"] * row["width"]
    assert (row["iou"][NEVER], row["dice"][NEVER]) == (None, None)
    assert row["tp_px"] == [row["pixel_count"][0], 0, 0]
    assert row["fn_px"] == [row["pixel_count"][1], 0, 0]
    assert row["fp_px"] == [0, row["pixel_count"][1], 0]
    (unscored,) = predict(bundle, [make_image("a", truth=PET_CLASSES.ignore_index)])
    assert unscored["iou"] == [None] * 3
    assert unscored["mask"] == row["mask"]


def test_non_finite_logits_give_a_mask_and_null_statistics(bundle: Path, tmp_path: Path) -> None:
    weights = load_bundle(str(bundle)).model.state_dict()
    weights["network.head.bias"][0] = np.nan
    save_pet_bundle(tmp_path, weights)
    (row,) = predict(tmp_path, [make_image("a", truth=1)])
    assert (row["entropy"], set(row["mean_confidence"])) == (None, {None})
    assert sum(row["pixel_count"]) == len(row["mask"]) == row["height"] * row["width"]


def test_a_replaced_bundle_is_refused_with_the_first_fragment(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    (other / "bundle.json").write_text((other / "bundle.json").read_text() + "\n")
    job = replace(make_pipeline_job(bundle), bundle_uri=str(other))
    predictor = FragmentPredictor(job, 1, LocalLedger(PREDICT))
    with pytest.raises(BundleError, match="replaced during the run"):
        predictor(pack_decoded(0, [make_image("a")], Stopwatch()))


@pytest.mark.integration  # Compiling takes half a minute.
def test_a_compiled_model_gives_the_same_masks(bundle: Path) -> None:
    images = [make_image("a"), make_image("bb"), make_image("ccc")]
    compiled = predict(bundle, images, SETTINGS.model_copy(update={"compile": True}))
    for row, expected in zip(compiled, predict(bundle, images), strict=True):
        mask, whole = (np.frombuffer(one["mask"], np.uint8) for one in (row, expected))
        assert (mask == whole).mean() > 0.99  # the last bits of the logits differ
        assert row["entropy"] == pytest.approx(expected["entropy"], rel=1e-3)


def test_compiling_without_a_compiler_names_the_cause_and_the_remedy(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SegmentSettings(
        batch_size=3, precision="fp32", compile=True
    )  # a shape that this process did not compile
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    torch.compiler.reset()
    with pytest.raises(ClusterError, match=r"cannot compile .*: .*(g|C)\+\+.*; install a C\+\+ compiler on every node"):
        predict(bundle, [make_image("a")], settings)
