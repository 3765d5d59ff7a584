"""The ledger of deaths: whoever kills its worker is found and passed over, and nobody else."""

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
from segray.segmentation.stages import decode, pipeline, predictor
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.ledger import DECODE, MAX_DEATHS_PER_IMAGE, PREDICT, Ledger
from tests import segment as tests_of_segment
from tests.conftest import PET_CLASSES
from tests.segmentation.local_ledger import LocalLedger
from tests.segmented import NUM_IMAGES, SETTINGS, read_rows, segment


def test_an_image_is_blamed_after_several_deaths_and_the_others_never() -> None:
    ledger = Ledger(1)
    orders = ledger.begin(DECODE, 7)
    assert (orders.is_careful, orders.failed) == (False, frozenset())
    for death in range(MAX_DEATHS_PER_IMAGE):
        orders = ledger.begin(DECODE, 7)  # the one before has not ended
        assert (orders.is_careful, orders.failed) == (True, frozenset()), death
        ledger.enter(DECODE, 7, orders.attempt, 0)
        ledger.enter(DECODE, 7, orders.attempt, 4)
    orders = ledger.begin(DECODE, 7)
    assert orders.failed == {4}
    assert ledger.begin(PREDICT, 7).failed == frozenset()
    assert ledger.begin(DECODE, 8).failed == frozenset()
    ledger.end(DECODE, 7, orders.attempt)
    assert ledger.begin(DECODE, 7).failed == {4}  # its node was lost: what was learned is known


def test_suspects_are_taken_last_and_those_that_died_most_at_the_end() -> None:
    ledger = Ledger(1)
    for index in (1, 3, 1):
        ledger.enter(DECODE, 0, ledger.begin(DECODE, 0).attempt, index)
    assert ledger.begin(DECODE, 0).sort(5) == [0, 2, 4, 3, 1]


def test_a_death_after_the_last_image_is_no_images_fault() -> None:
    ledger = Ledger(1)
    orders = ledger.begin(DECODE, 0)
    ledger.enter(DECODE, 0, orders.attempt, 4)
    ledger.enter(DECODE, 0, orders.attempt, None)
    assert ledger.begin(DECODE, 0).suspects == ()


def test_an_attempt_that_was_taken_for_dead_is_not_believed() -> None:
    ledger = Ledger(1)
    zombie, living = ledger.begin(DECODE, 0), ledger.begin(DECODE, 0)
    ledger.enter(DECODE, 0, living.attempt, 2)
    ledger.enter(DECODE, 0, zombie.attempt, 4)
    ledger.end(DECODE, 0, zombie.attempt)
    assert ledger.begin(DECODE, 0).suspects == (2,)


def test_a_ledger_that_was_lost_learns_again() -> None:
    ledger = Ledger(1)
    ledger.enter(DECODE, 0, 3, 1)
    ledger.end(DECODE, 0, 3)
    assert ledger.begin(DECODE, 0).suspects == ()


def test_a_fragment_that_ended_well_begins_again_at_full_speed() -> None:
    ledger = Ledger(1)
    for _ in range(50):
        orders = ledger.begin(DECODE, 1)
        assert not orders.is_careful
        ledger.end(DECODE, 1, orders.attempt)


def test_deaths_at_no_image_come_to_an_end() -> None:
    ledger = Ledger(1)
    for _ in range(11):
        ledger.begin(DECODE, 3)
    with pytest.raises(ClusterError, match=r"fragment 3 died 11 times, at no image in particular"):
        ledger.begin(DECODE, 3)


def test_predictors_that_die_while_loading_come_to_an_end_and_progress_starts_the_count_anew() -> None:
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
    """A decoder of one fragment of five images, and its ledger."""
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
    made = FragmentDecoder(
        str(tmp_path / "run"), frozen.cut_sha256, PET_CLASSES, (16, 16), SegmentSettings(), False, ledger
    )
    return made, ledger, names


def decode_fragment(decoder: FragmentDecoder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = decoder(pa.table({"fragment": [0]}))["rows"][0].as_py()
    return rows


def test_with_care_every_image_is_announced_and_decodes_to_the_same(
    decoder: tuple[FragmentDecoder, LocalLedger, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ledger, names = decoder
    fast = made(pa.table({"fragment": [0]})).drop_columns("steps")
    ledger.begin(0)
    announced: list[int | None] = []
    monkeypatch.setattr(ledger, "enter", lambda fragment, orders, index: announced.append(index))
    assert made(pa.table({"fragment": [0]})).drop_columns("steps").equals(fast)
    assert announced == [0, 1, 2, 3, 4, None]
    assert [Path(row["uri"]).name for row in fast["rows"][0].as_py()] == names


def test_a_failed_image_is_not_touched_again(
    decoder: tuple[FragmentDecoder, LocalLedger, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ledger, _ = decoder
    for _ in range(MAX_DEATHS_PER_IMAGE):
        ledger.enter(0, ledger.begin(0), 2)
    read: list[str] = []

    def note(uri: str, *rest: Any) -> Any:
        read.append(Path(uri).name)
        return fetch_image(uri, *rest)

    monkeypatch.setattr(decode, "fetch_image", note)
    rows = decode_fragment(made)
    assert read == ["0.png", "1.png", "3.png", "4.png"]
    assert [row["error_kind"] for row in rows] == [None, None, "failed", None, None]
    assert rows[2]["error_message"] == "the process decoding it died 3 times"


@pytest.mark.parametrize("is_hopeless", [False, True])
def test_too_little_memory_beside_others_is_tried_alone(
    decoder: tuple[FragmentDecoder, LocalLedger, list[str]], monkeypatch: pytest.MonkeyPatch, is_hopeless: bool
) -> None:
    made, _, _ = decoder
    tries: list[str] = []

    def read(uri: str, *rest: Any) -> Any:
        if uri.endswith("3.png"):
            tries.append(uri)
            if is_hopeless or len(tries) == 1:
                raise MemoryError
        return fetch_image(uri, *rest)

    monkeypatch.setattr(decode, "fetch_image", read)
    kinds = [row["error_kind"] for row in decode_fragment(made)]
    assert kinds == [None, None, None, "failed" if is_hopeless else None, None]
    assert len(tries) == 2


class DyingPredictor(predictor.FragmentPredictor):
    """Dies of a segmentation fault at images of one height."""

    HEIGHT = 40 + 7 * 3

    def _predict(self, images: Any, watch: Any) -> None:
        if any(image.row["height"] == self.HEIGHT for image in images):
            ctypes.string_at(0)
        super()._predict(images, watch)


@pytest.mark.usefixtures("ray_session")
def test_an_image_that_kills_its_predictor_is_one_failed_row(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(tests_of_segment)  # workers cannot import tests
    monkeypatch.setattr(pipeline, "FragmentPredictor", DyingPredictor)
    outcome = segment(bundle_dir, bucket, tmp_path / "run", settings=SETTINGS)
    assert (outcome.num_ok, outcome.errors) == (NUM_IMAGES - 1, {"failed": 1})
    for row, other in zip(read_rows(tmp_path / "run"), read_rows(finished), strict=True):
        if decode_image(Path(row["uri"]).read_bytes()).shape[0] == DyingPredictor.HEIGHT:
            assert (row["error_kind"], row["mask"], row["height"]) == ("failed", None, DyingPredictor.HEIGHT)
            assert row["error_message"] == "the process predicting it died 3 times"
        else:
            assert row == other
