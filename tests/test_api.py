"""The Python API on a real Ray: train, segment, predict, read results."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import segray
from segray.errors import ConfigError, DataError, MissingFileError
from segray.segmentation.job import SegmentResult
from tests.conftest import NUM_TEST, SHAPE_SIZE
from tests.processes import find_workers
from tests.segmented import NUM_IMAGES, SETTINGS

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("ray_session")]


def build_config(shapes_root: Path, output: Path) -> dict[str, Any]:
    """Return a configuration that trains a tiny network for one epoch."""
    return {
        "data": {"layout": {"oxford_iiit_pet": {"root": str(shapes_root)}}, "ignore_values": [0]},
        "model": {"arch": "classic_unet", "widths": [8, 16]},
        "image_size": [SHAPE_SIZE, SHAPE_SIZE],
        "train": {"num_epochs": 1, "global_batch_size": 6},
        "output": str(output),
    }


@pytest.fixture(scope="module")
def trained(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> segray.TrainResult:
    return segray.train(build_config(shapes_root, tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module")
def segmented(
    bundle_dir: Path, bucket: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> SegmentResult:
    """A run over labelled images and a truncated one."""
    folder = tmp_path_factory.mktemp("segmented")
    truncated = folder / "truncated.png"
    truncated.write_bytes((bucket / "images" / "image 0#.png").read_bytes()[:500])
    (folder / "masks").mkdir()
    (folder / "masks" / "truncated.png").write_bytes((bucket / "masks" / "image 0#.png").read_bytes())
    return segray.segment(
        bundle=bundle_dir,
        images=[bucket / "images", truncated],
        masks=[bucket / "masks", folder / "masks"],
        output=folder / "run",
        settings=SETTINGS,
    )


def test_train_returns_the_bundle_and_its_scores(trained: segray.TrainResult) -> None:
    assert Path(trained.bundle, "model.safetensors").exists()
    assert isinstance(trained.metrics, Mapping)
    assert trained.metrics["epoch"] == 1
    assert 0 <= trained.metrics["val_mean_iou"] <= 1


def test_segment_returns_counts_summary_and_rows(segmented: SegmentResult) -> None:
    assert segmented.num_ok == NUM_IMAGES
    assert segmented.errors == {"truncated": 1}
    assert segmented.summary["class_name"].to_pylist() == ["pet", "background", "border"]
    rows = segmented.rows(columns=["uri", "status", "error_kind"])
    assert rows.column_names == ["uri", "status", "error_kind"]
    assert len(rows) == NUM_IMAGES + 1
    assert rows["uri"].to_pylist() == sorted(rows["uri"].to_pylist())
    assert rows.filter(pa.compute.equal(rows["status"], "error"))["error_kind"].to_pylist() == ["truncated"]


def test_a_second_call_returns_the_same_result(segmented: SegmentResult, bundle_dir: Path, bucket: Path) -> None:
    folder = Path(segmented.output).parent
    again = segray.segment(
        bundle=bundle_dir,
        images=[bucket / "images", folder / "truncated.png"],
        masks=[bucket / "masks", folder / "masks"],
        output=segmented.output,
        settings=SETTINGS.model_dump(),
    )
    assert again == segmented


def read_fragments(output: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(output, "images").glob("*.parquet")}


def test_a_killed_predictor_does_not_change_any_byte(
    segmented: SegmentResult, bundle_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"

    def kill_a_predictor() -> bool:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            if list(output.glob("images/*.parquet")) and (predictors := find_workers("FragmentPredictor")):
                predictors[-1].kill()
                return True
            time.sleep(0.01)
        return False

    settings = SETTINGS.model_copy(update={"fragment_size": 1})
    inputs = json.loads((Path(segmented.output) / "run.json").read_text())["inputs"]
    with ThreadPoolExecutor(1) as executor:
        killer = executor.submit(kill_a_predictor)
        result = segray.segment(
            bundle=bundle_dir, images=inputs["images"], masks=inputs["masks"], output=output, settings=settings
        )
        assert killer.result()
    assert result.rows().equals(segmented.rows())


def test_a_run_without_some_of_its_files_is_completed_with_the_same_bytes_and_nothing_is_printed(
    segmented: SegmentResult, bundle_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(segmented.output, tmp_path / "run"))
    before = read_fragments(str(output))
    (output / "images" / "part-00000001.parquet").unlink()
    inputs = json.loads((output / "run.json").read_text())["inputs"]
    result = segray.segment(
        bundle=bundle_dir, images=inputs["images"], masks=inputs["masks"], output=output, settings=SETTINGS
    )
    assert result.num_ok == NUM_IMAGES
    assert read_fragments(str(output)) == before
    assert capfd.readouterr().out == ""


def test_a_loaded_bundle_predicts_the_masks_of_segment_bit_for_bit(segmented: SegmentResult, bundle_dir: Path) -> None:
    model = segray.load_bundle(bundle_dir, settings=SETTINGS)
    assert model.class_names == ("pet", "background", "border")
    masks = dict(segray.open_results(segmented.output).masks())
    assert len(masks) == NUM_IMAGES
    for uri, mask in masks.items():
        prediction = model.predict(np.asarray(Image.open(uri).convert("RGB")))
        assert prediction.mask.dtype == mask.dtype
        assert len(np.unique(mask)) > 1  # Otherwise a shifted mask would be equal too.
        assert np.array_equal(prediction.mask, mask)
        assert prediction.confidence.dtype == np.float32
        assert prediction.confidence.shape == mask.shape
    rows = segmented.rows(columns=["uri", "mean_confidence"]).to_pylist()
    (expected,) = [row["mean_confidence"] for row in rows if row["uri"] == uri]
    for index, value in enumerate(expected):
        if value is not None:
            assert prediction.confidence[mask == index].mean(dtype=np.float64) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)],
)
def test_predict_rejects_other_arrays(trained: segray.TrainResult, image: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"expected an image of shape \(height, width, 3\) and dtype uint8, got"):
        segray.load_bundle(trained.bundle).predict(image)


def test_results_give_rows_masks_and_summary(segmented: SegmentResult) -> None:
    results = segray.open_results(segmented.output)
    assert results.is_complete
    assert results.summary.equals(segmented.summary)
    assert results.images.count_rows() == NUM_IMAGES + 1
    first, second = results.images.to_table(columns=["uri"], filter=pa.compute.field("status") == "ok")[
        "uri"
    ].to_pylist()[:2]
    chosen = dict(results.masks(uris=[second]))
    assert list(chosen) == [second]
    row = segmented.rows(["uri", "height", "width"]).to_pylist()[0]
    assert row["uri"] == first
    assert dict(results.masks())[first].shape == (row["height"], row["width"])


def test_status_describes_a_finished_run(segmented: SegmentResult) -> None:
    status = segray.status(segmented.output)
    assert (status.state, status.num_planned, status.num_done) == ("complete", NUM_IMAGES + 1, NUM_IMAGES + 1)
    with pytest.raises(MissingFileError, match="no run at"):
        segray.status(Path(segmented.output) / "images")


def test_check_reports_problems_without_raising(shapes_root: Path, tmp_path: Path) -> None:
    config = build_config(shapes_root, tmp_path)
    report = segray.check(config)
    assert report.ok
    assert not report.faults
    assert report.splits["val"].num_samples == NUM_TEST
    config["data"]["class_values"] = [1, 2, 4]
    report = segray.check(config)
    assert not report.ok
    assert "3" in str(report.faults[0])
    assert not list(tmp_path.iterdir())


def test_export_writes_a_model_file(trained: segray.TrainResult, tmp_path: Path) -> None:
    exported = segray.export(trained.bundle, format="torch_export", output=tmp_path / "model.pt2")
    assert Path(exported.uri).stat().st_size == exported.size_bytes
    with pytest.raises(ConfigError, match="onnx"):
        segray.export(trained.bundle, format="tflite")


def test_wrong_settings_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"segment\.batch_sise: unknown setting; did you mean segment\.batch_size\?"):
        segray.segment(bundle=tmp_path, images=tmp_path, output=tmp_path, settings={"batch_sise": 3})
    with pytest.raises(ConfigError, match="data: this setting is required"):
        segray.train({"output": str(tmp_path), "image_size": [64, 64]})


def test_python_dash_m_runs_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "segray", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"segray {segray.__version__}"
