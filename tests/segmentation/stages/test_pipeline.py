"""The stages on Ray: deaths, hangs and unexpected exceptions of workers, and many fragments."""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.data import DataContext

from segray.errors import ClusterError
from segray.segmentation.stages import pipeline, source
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.predictor import FragmentPredictor
from segray.segmentation.stages.writer import FragmentWriter
from tests import segmentation as segmentation_tests
from tests.segmented import NUM_IMAGES, SETTINGS, read_rows, segment

HEIGHT = 40 + 7 * 3  # of one image

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(autouse=True)
def pickle_stages() -> None:
    """Let workers, which cannot import the tests, receive the stages below."""
    cloudpickle.register_pickle_by_value(segmentation_tests)


def require_same_but(rows: list[dict[str, Any]], expected: list[dict[str, Any]], **columns: Any) -> None:
    """Assert that the row of the image of height ``HEIGHT`` has these columns, and all others are as expected."""
    for row, other in zip(rows, expected, strict=True):
        if other["height"] == HEIGHT:
            assert {name: row[name] for name in columns} == columns
        else:
            assert row == other


def test_the_rows_of_a_streamed_source_are_the_same(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_MAX_WAITING", 2)  # Far fewer than the ten fragments.
    settings = SETTINGS.model_copy(update={"fragment_size": 1})
    outcome = segment(bundle_dir, bucket, tmp_path / "run", settings=settings)
    assert outcome.num_ok == NUM_IMAGES
    assert len(list((tmp_path / "run/images").iterdir())) == NUM_IMAGES
    assert read_rows(tmp_path / "run") == read_rows(finished)


class DyingPredictor(FragmentPredictor):
    """Crashes with a segmentation fault when it predicts the image of height ``HEIGHT``."""

    def _predict(self, fragment: int, images: Any, watch: Any) -> None:
        if any(image.row["height"] == HEIGHT for image in images):
            ctypes.string_at(0)
        super()._predict(fragment, images, watch)


@pytest.mark.slow
def test_an_image_that_kills_its_predictor_becomes_one_failed_row(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "FragmentPredictor", DyingPredictor)
    outcome = segment(bundle_dir, bucket, tmp_path / "run")
    assert (outcome.num_ok, outcome.errors) == (NUM_IMAGES - 1, {"failed": 1})
    message = "the worker process died 3 times while predicting this image"
    row = {"error_kind": "failed", "error_message": message, "mask": None, "height": HEIGHT}
    require_same_but(read_rows(tmp_path / "run"), read_rows(finished), **row)


class FailingGpu(FragmentPredictor):
    """Its GPU fails at the first fragment, in the first process."""

    marker: Path

    def _predict(self, fragment: int, images: Any, watch: Any) -> None:
        import torch

        with self._named_and_limited(fragment, images):
            if not self.marker.exists():
                self.marker.touch()
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        super()._predict(fragment, images, watch)


@pytest.mark.slow
def test_rows_are_identical_after_a_gpu_failed_once(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FailingGpu, "marker", tmp_path / "failed", raising=False)
    monkeypatch.setattr(pipeline, "FragmentPredictor", FailingGpu)
    assert segment(bundle_dir, bucket, tmp_path / "run").num_ok == NUM_IMAGES
    assert (tmp_path / "failed").exists()
    assert read_rows(tmp_path / "run") == read_rows(finished)


class HangingDecoder(FragmentDecoder):
    """Hangs in C, with Python's lock, when it decodes the image of height ``HEIGHT``."""

    def _decode_image(self, content: bytes) -> Any:
        decoded = super()._decode_image(content)
        if decoded[1][0] == HEIGHT:
            ctypes.PyDLL(None).sleep(600)
        return decoded


@pytest.mark.slow
def test_an_image_that_hangs_becomes_one_timeout_row(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "FragmentDecoder", HangingDecoder)
    settings = SETTINGS.model_copy(update={"image_timeout_s": 5.0})
    outcome = segment(bundle_dir, bucket, tmp_path / "run", settings=settings)
    assert (outcome.num_ok, outcome.errors) == (NUM_IMAGES - 1, {"timeout": 1})
    message = "decoding this image took longer than 5 s (segment.image_timeout_s), 3 times"
    row = {"error_kind": "timeout", "error_message": message, "mask": None, "height": None}
    require_same_but(read_rows(tmp_path / "run"), read_rows(finished), **row)


class FailingDecoder(FragmentDecoder):
    """Raises an unexpected exception at every image."""

    def _decode_image(self, content: bytes) -> Any:
        raise ValueError("odd\nmore lines")


class FailingLoad(FragmentPredictor):
    """Raises an unexpected exception while it loads the model."""

    def _load(self, *_: Any) -> None:
        raise ValueError("odd\nmore lines")


class FailingPredictor(FragmentPredictor):
    """Raises an unexpected exception at every fragment."""

    def _unpack(self, *_: Any) -> Any:
        raise ValueError("odd\nmore lines")


class FailingWriter(FragmentWriter):
    """Raises an unexpected exception at every fragment."""

    def _encode(self, *_: Any) -> Any:
        raise ValueError("odd\nmore lines")


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("FragmentDecoder", FailingDecoder, r"^decoding .*/image \d#.png of fragment \d failed: ValueError: odd; "),
        ("FragmentPredictor", FailingLoad, "^loading the model failed: ValueError: odd; "),
        ("FragmentPredictor", FailingPredictor, r"^predicting fragment \d failed: ValueError: odd; "),
        ("FragmentWriter", FailingWriter, r"^writing fragment \d to .*/images/part-0+\d.parquet failed: ValueError: "),
    ],
    ids=["decode", "load", "predict", "write"],
)
def test_an_unexpected_exception_in_a_stage_is_one_line_that_names_its_cause(
    bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: Any, message: str
) -> None:
    monkeypatch.setattr(pipeline, name, stage)
    with pytest.raises(ClusterError, match=message) as caught:
        segment(bundle_dir, bucket, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("rerun with SEGRAY_WORKER_LOGS=1 to see the workers' output")


class SlowDecoder(FragmentDecoder):
    """Its first two processes die; then it takes three seconds per image."""

    folder: Path

    def _decode_image(self, content: bytes) -> Any:
        if len(list(self.folder.iterdir())) < 2:
            (self.folder / str(time.time_ns())).touch()
            os._exit(1)
        time.sleep(3)
        return super()._decode_image(content)


@pytest.mark.slow
def test_a_fragment_that_takes_longer_than_rays_limit_completes_if_images_are_finished(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data ends the execution after 25 s without a finished fragment; it is then continued."""
    folder = tmp_path / "deaths"
    folder.mkdir()
    monkeypatch.setattr(SlowDecoder, "folder", folder, raising=False)
    monkeypatch.setattr(pipeline, "FragmentDecoder", SlowDecoder)
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 25.0)
    settings = SETTINGS.model_copy(update={"fragment_size": NUM_IMAGES, "image_timeout_s": 5.0})
    assert segment(bundle_dir, bucket, tmp_path / "run", settings=settings).num_ok == NUM_IMAGES
    assert read_rows(tmp_path / "run") == read_rows(finished)
