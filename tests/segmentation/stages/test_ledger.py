"""The ledger of worker deaths: images that crash their worker process become error rows, and no others do."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray import cloudpickle

from segray.config import SegmentSettings
from segray.data.images import decode_image
from segray.data.samples import fetch_image
from segray.errors import ClusterError
from segray.runs import plan
from segray.runs.plan import ListedImage
from segray.segmentation.job import PipelineJob
from segray.segmentation.stages import decode, pipeline, predictor
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.ledger import DECODE, MAX_DEATHS_PER_IMAGE, PREDICT, Ledger
from tests import segmentation as segmentation_tests
from tests.conftest import PET_CLASSES
from tests.segmentation.local_ledger import LocalLedger
from tests.segmented import NUM_IMAGES, SETTINGS, read_rows, segment


def test_only_an_image_that_was_processed_in_repeated_deaths_fails() -> None:
    ledger = Ledger(1)
    attempt_plan = ledger.begin(DECODE, 7)
    assert (attempt_plan.one_by_one, attempt_plan.failed) == (False, frozenset())
    for death in range(MAX_DEATHS_PER_IMAGE):
        attempt_plan = ledger.begin(DECODE, 7)  # the previous attempt has not ended
        assert (attempt_plan.one_by_one, attempt_plan.failed) == (True, frozenset()), death
        ledger.record_image(DECODE, 7, attempt_plan.attempt, 0)
        ledger.record_image(DECODE, 7, attempt_plan.attempt, 4)
    attempt_plan = ledger.begin(DECODE, 7)
    assert attempt_plan.failed == {4}
    assert ledger.begin(PREDICT, 7).failed == frozenset()
    assert ledger.begin(DECODE, 8).failed == frozenset()
    ledger.end(DECODE, 7, attempt_plan.attempt)
    assert ledger.begin(DECODE, 7).failed == {4}  # the node was lost, but recorded deaths are kept


def test_suspects_are_processed_last_ordered_by_number_of_deaths() -> None:
    ledger = Ledger(1)
    for index in (1, 3, 1):
        ledger.record_image(DECODE, 0, ledger.begin(DECODE, 0).attempt, index)
    assert ledger.begin(DECODE, 0).order_images(5) == [0, 2, 4, 3, 1]


def test_a_death_after_the_last_image_makes_no_image_a_suspect() -> None:
    ledger = Ledger(1)
    attempt_plan = ledger.begin(DECODE, 0)
    ledger.record_image(DECODE, 0, attempt_plan.attempt, 4)
    ledger.record_image(DECODE, 0, attempt_plan.attempt, None)
    assert ledger.begin(DECODE, 0).suspects == ()


def test_calls_of_an_attempt_presumed_dead_are_ignored() -> None:
    ledger = Ledger(1)
    earlier, current = ledger.begin(DECODE, 0), ledger.begin(DECODE, 0)
    ledger.record_image(DECODE, 0, current.attempt, 2)
    ledger.record_image(DECODE, 0, earlier.attempt, 4)
    ledger.end(DECODE, 0, earlier.attempt)
    assert ledger.begin(DECODE, 0).suspects == (2,)


def test_a_restarted_empty_ledger_accepts_calls_of_running_attempts() -> None:
    ledger = Ledger(1)
    ledger.record_image(DECODE, 0, 3, 1)
    ledger.end(DECODE, 0, 3)
    assert ledger.begin(DECODE, 0).suspects == ()


def test_a_fragment_without_deaths_is_processed_at_full_speed_again() -> None:
    ledger = Ledger(1)
    for _ in range(50):
        attempt_plan = ledger.begin(DECODE, 1)
        assert not attempt_plan.one_by_one
        ledger.end(DECODE, 1, attempt_plan.attempt)


def test_too_many_unexplained_deaths_end_the_run() -> None:
    ledger = Ledger(1)
    for _ in range(11):
        ledger.begin(DECODE, 3)
    with pytest.raises(ClusterError, match=r"fragment 3 died 11 times, and no image explains it"):
        ledger.begin(DECODE, 3)


def test_predictors_that_keep_dying_while_loading_end_the_run_unless_there_is_progress() -> None:
    ledger = Ledger(num_predictors=2)
    for _ in range(10):
        ledger.start_predictor()
    ledger.begin(PREDICT, 0)
    for _ in range(10):
        ledger.start_predictor()
    with pytest.raises(ClusterError, match="predictors died 10 times while loading the model"):
        ledger.start_predictor()


@pytest.fixture
def decoder(tmp_path: Path) -> tuple[FragmentDecoder, LocalLedger, list[str]]:
    """A decoder with one fragment of five images, its ledger, and the names of the images."""
    names = [f"{index}.png" for index in range(5)]
    images = []
    for index, name in enumerate(names):
        Image.fromarray(np.full((9, 8 + index, 3), index, np.uint8)).save(tmp_path / name)
        images.append(ListedImage(str(tmp_path / name)))
    spool = tmp_path / "spool"
    spool.mkdir()
    frozen = plan.spool_plan(plan.cut_fragments(images, SegmentSettings()), spool)
    plan.save_plan(str(tmp_path / "run"), frozen, spool)
    ledger = LocalLedger(DECODE)
    job = PipelineJob(
        str(tmp_path / "run"), frozen.cut_sha256, "", "", PET_CLASSES, (16, 16), SegmentSettings(), has_truth=False
    )
    return FragmentDecoder(job, ledger), ledger, names


def decode_fragment(decoder: FragmentDecoder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = decoder(pa.table({"fragment": [0]}))["rows"][0].as_py()
    return rows


def test_one_by_one_every_image_is_recorded_and_decoded_to_the_same_row(
    decoder: tuple[FragmentDecoder, LocalLedger, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ledger, names = decoder
    fast = made(pa.table({"fragment": [0]})).drop_columns("steps")
    ledger.begin(0)
    recorded: list[int | None] = []
    monkeypatch.setattr(ledger, "record_image", lambda fragment, attempt_plan, index: recorded.append(index))
    assert made(pa.table({"fragment": [0]})).drop_columns("steps").equals(fast)
    assert recorded == [0, 1, 2, 3, 4, None]
    assert [Path(row["uri"]).name for row in fast["rows"][0].as_py()] == names


def test_a_failed_image_is_not_read_again(
    decoder: tuple[FragmentDecoder, LocalLedger, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ledger, _ = decoder
    for _ in range(MAX_DEATHS_PER_IMAGE):
        ledger.record_image(0, ledger.begin(0), 2)
    read: list[str] = []

    def fetch(uri: str, *rest: Any) -> Any:
        read.append(Path(uri).name)
        return fetch_image(uri, *rest)

    monkeypatch.setattr(decode, "fetch_image", fetch)
    rows = decode_fragment(made)
    assert read == ["0.png", "1.png", "3.png", "4.png"]
    assert [row["error_kind"] for row in rows] == [None, None, "failed", None, None]
    assert rows[2]["error_message"] == "the worker process died 3 times while decoding this image"


@pytest.mark.parametrize("always_fails", [False, True])
def test_an_image_that_exhausts_memory_is_retried_alone(
    decoder: tuple[FragmentDecoder, LocalLedger, list[str]], monkeypatch: pytest.MonkeyPatch, always_fails: bool
) -> None:
    made, _, _ = decoder
    tries: list[str] = []

    def read(uri: str, *rest: Any) -> Any:
        if uri.endswith("3.png"):
            tries.append(uri)
            if always_fails or len(tries) == 1:
                raise MemoryError
        return fetch_image(uri, *rest)

    monkeypatch.setattr(decode, "fetch_image", read)
    kinds = [row["error_kind"] for row in decode_fragment(made)]
    assert kinds == [None, None, None, "failed" if always_fails else None, None]
    assert len(tries) == 2


class DyingPredictor(predictor.FragmentPredictor):
    """Crashes with a segmentation fault when it predicts an image of height ``HEIGHT``."""

    HEIGHT = 40 + 7 * 3

    def _predict(self, images: Any, watch: Any) -> None:
        if any(image.row["height"] == self.HEIGHT for image in images):
            ctypes.string_at(0)
        super()._predict(images, watch)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_image_that_kills_its_predictor_becomes_one_failed_row(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(segmentation_tests)  # Workers cannot import the tests.
    monkeypatch.setattr(pipeline, "FragmentPredictor", DyingPredictor)
    outcome = segment(bundle_dir, bucket, tmp_path / "run", settings=SETTINGS)
    assert (outcome.num_ok, outcome.errors) == (NUM_IMAGES - 1, {"failed": 1})
    for row, other in zip(read_rows(tmp_path / "run"), read_rows(finished), strict=True):
        if decode_image(Path(row["uri"]).read_bytes()).shape[0] == DyingPredictor.HEIGHT:
            assert (row["error_kind"], row["mask"], row["height"]) == ("failed", None, DyingPredictor.HEIGHT)
            assert row["error_message"] == "the worker process died 3 times while predicting this image"
        else:
            assert row == other
