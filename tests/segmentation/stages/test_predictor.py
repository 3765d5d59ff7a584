"""The predict stage without Ray: error rows, absent classes, a replaced bundle, a failing GPU, and the time limit."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from segray.config import SegmentSettings
from segray.errors import BundleError, ClusterError
from segray.models.bundle import load_bundle
from segray.segmentation.profile import Stopwatch
from segray.segmentation.stages.compression import compress, decompress
from segray.segmentation.stages.decode import DecodedImage, pack_decoded
from segray.segmentation.stages.ledger import MAX_DEATHS_PER_IMAGE, PREDICT
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
    predictor = FragmentPredictor(make_pipeline_job(bundle, settings), LocalLedger(PREDICT))
    rows: list[dict[str, Any]] = predictor(pack_decoded(7, decoded, Stopwatch()))["rows"][0].as_py()
    return [row if row["mask"] is None else {**row, "mask": restore_mask(row)} for row in rows]


def restore_mask(row: dict[str, Any]) -> bytes:
    return decompress(row["mask"], row["height"] * row["width"])


def make_image(uri: str, truth: int | None = None) -> DecodedImage:
    pixels = np.random.default_rng(len(uri)).integers(0, 256, (SHAPE_SIZE, SHAPE_SIZE, 3), np.uint8)
    height, width = 30, 20 + len(uri)
    truth_hw = None if truth is None else compress(np.full((height, width), truth, np.uint8))
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
    predictor = FragmentPredictor(job, LocalLedger(PREDICT))
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


def make_predictor(bundle: Path, ledger: LocalLedger | None = None, **settings: Any) -> FragmentPredictor:
    job = make_pipeline_job(bundle, SETTINGS.model_copy(update=settings))
    return FragmentPredictor(job, ledger or LocalLedger(PREDICT))


def test_the_number_of_threads_is_that_of_the_settings(bundle: Path) -> None:
    """It may change the last bits, so it depends neither on the node nor on how many predictors there are."""
    for num_threads in (2, 1):
        make_predictor(bundle, num_threads_per_predictor=num_threads)
        assert torch.get_num_threads() == num_threads


def make_fragment(num_images: int = 5) -> pa.Table:
    return pack_decoded(7, [make_image("i" * (1 + index), truth=index % 3) for index in range(num_images)], Stopwatch())


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_one_by_one_gives_the_same_rows(bundle: Path, num_deaths: int) -> None:
    ledger = LocalLedger(PREDICT)
    predictor = make_predictor(bundle, ledger)
    expected = predictor(make_fragment()).drop_columns("steps")
    for _ in range(num_deaths):
        ledger.begin(7)
    assert predictor(make_fragment()).drop_columns("steps").equals(expected)


def test_a_failed_image_is_not_predicted_again(bundle: Path) -> None:
    ledger = LocalLedger(PREDICT)
    predictor = make_predictor(bundle, ledger)
    expected = predictor(make_fragment())["rows"][0].as_py()
    ledger.begin(7)
    for _ in range(MAX_DEATHS_PER_IMAGE):
        ledger.record_image(7, ledger.begin(7), 2)
    rows = predictor(make_fragment())["rows"][0].as_py()
    assert rows[:2] + rows[3:] == expected[:2] + expected[3:]
    assert (rows[2]["status"], rows[2]["error_kind"], rows[2]["mask"]) == ("error", "failed", None)
    assert rows[2]["error_message"] == "the worker process died 3 times while predicting this image"


class Exit(BaseException):
    """Stands for the end of the process."""


def fail_on_device(*_: Any) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")


@pytest.mark.parametrize("method", ["launch", "finish"])
def test_a_failing_gpu_ends_the_process_and_after_three_times_at_one_image_only_that_fails(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Exit

    monkeypatch.setattr("segray.segmentation.stages.predictor.os._exit", leave)
    ledger = LocalLedger(PREDICT)
    predictor = make_predictor(bundle, ledger)
    expected = predictor(make_fragment())["rows"][0].as_py()
    killer = expected[3]["width"]
    inference = predictor._inference
    launch, finish = inference.launch, inference.finish

    def launch_or_fail(images: Any, sizes: Any, watch: Stopwatch) -> Any:
        launched = launch(images, sizes, watch)
        is_killer = any(width == killer for _, width in sizes)
        if is_killer and method == "launch":
            fail_on_device()
        return launched, is_killer

    def finish_or_fail(launched: Any, *rest: Any) -> Any:
        if launched[1] and method == "finish":
            fail_on_device()
        return finish(launched[0], *rest)

    monkeypatch.setattr(inference, "launch", launch_or_fail)
    monkeypatch.setattr(inference, "finish", finish_or_fail)
    for _ in range(2 + MAX_DEATHS_PER_IMAGE):
        with pytest.raises(Exit):
            predictor(make_fragment())
    rows = predictor(make_fragment())["rows"][0].as_py()
    assert [row["error_kind"] for row in rows] == [None, None, None, "failed", None]
    assert rows[:3] + rows[4:] == expected[:3] + expected[4:]
    assert codes == [1] * 5
    assert "illegal memory access" in capsys.readouterr().err


def test_a_gpu_that_fails_at_every_image_ends_the_run_with_its_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise Exit

    monkeypatch.setattr("segray.segmentation.stages.predictor.os._exit", leave)
    predictor = make_predictor(bundle)
    monkeypatch.setattr(predictor._inference, "launch", fail_on_device)
    for _ in range(1 + 3 * MAX_DEATHS_PER_IMAGE):
        with pytest.raises(Exit):
            predictor(make_fragment())
    with pytest.raises(ClusterError, match=r"dies at every image \(CUDA error: an illegal memory access") as caught:
        predictor(make_fragment())
    assert "\n" not in str(caught.value)


def test_a_lack_of_gpu_memory_is_not_a_failing_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    predictor = make_predictor(bundle)
    monkeypatch.setattr(predictor._inference, "compute_logits", fail)
    expected = r"not enough GPU memory for batches of 2 .*; lower segment.batch_size \(.*segment.allow_mixed: true"
    with pytest.raises(ClusterError, match=expected):
        predictor(make_fragment())


def test_an_unexpected_exception_names_the_images_and_the_fragment(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("odd\nmore lines")

    predictor = make_predictor(bundle)
    monkeypatch.setattr(predictor._inference, "finish", fail)
    with pytest.raises(ClusterError, match=r"^predicting i and 1 more of fragment 7 failed: ValueError: odd; rerun"):
        predictor(make_fragment())
    monkeypatch.setattr(predictor, "_unpack", fail)
    with pytest.raises(ClusterError, match=r"^predicting fragment 7 failed: ValueError: odd; rerun"):
        predictor(make_fragment())
    monkeypatch.setattr(FragmentPredictor, "_load", fail)
    with pytest.raises(ClusterError, match=r"^loading the model failed: ValueError: odd; rerun"):
        make_predictor(bundle)(make_fragment())


def test_a_batch_may_take_the_time_limit_of_all_of_its_images(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits_s: list[float] = []

    @contextmanager
    def record(timeout_s: float) -> Iterator[None]:
        limits_s.append(timeout_s)
        yield

    monkeypatch.setattr("segray.segmentation.stages.predictor.limited_time", record)
    ledger = LocalLedger(PREDICT)
    predictor = make_predictor(bundle, ledger, image_timeout_s=10)
    predictor(make_fragment(3))
    assert limits_s == [20, 10, 20, 10]  # Two launches; each batch is finished when the next one is launched.
    limits_s.clear()
    ledger.begin(7)
    predictor(make_fragment(3))
    assert limits_s == [10] * 6
