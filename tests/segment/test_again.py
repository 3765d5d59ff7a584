"""Ray Data for real: the same call again goes on, a folder of another run is refused, and nothing is half-written."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from segray.errors import BundleError, DataError, MissingFileError, RunMismatchError, StorageError
from tests.segment.conftest import NUM_IMAGES, SETTINGS, read_rows, segment

pytestmark = pytest.mark.usefixtures("ray_session")


def read_files(output: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(output)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


def test_a_second_call_writes_nothing(finished: Path, bundle_dir: Path, bucket: Path) -> None:
    before = read_files(finished)
    outcome = segment(bundle_dir, bucket, finished)
    assert read_files(finished) == before
    assert outcome.num_ok == NUM_IMAGES


def test_a_lost_fragment_alone_is_made_again_with_the_same_bytes(
    finished: Path, bundle_dir: Path, bucket: Path
) -> None:
    before = read_files(finished)
    lost = "images/part-00000001.parquet"
    (finished / lost).unlink()
    segment(bundle_dir, bucket, finished)
    after = read_files(finished)
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert {name for name in after if after[name][1] != before[name][1]} == {lost}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": SETTINGS.model_copy(update={"batch_size": 4})}, r"segment\.batch_size: there 3, here 4"),
        ({"masks": False}, r"segment\.ground_truth: there True, here False"),
    ],
)
def test_a_folder_of_another_configuration_is_refused(
    finished: Path, bundle_dir: Path, bucket: Path, change: dict[str, Any], message: str
) -> None:
    before = read_files(finished)
    with pytest.raises(RunMismatchError, match=message):
        segment(bundle_dir, bucket, finished, **change)
    assert read_files(finished) == before


def test_a_folder_of_another_model_or_listing_is_refused(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "metrics": {"epoch": 2}}))
    with pytest.raises(RunMismatchError, match=r"another bundle\); choose another --output"):
        segment(bundle, bucket, finished)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    more = Path(shutil.copytree(bucket, tmp_path / "bucket"))
    with pytest.raises(RunMismatchError, match="another listing"):
        segment(bundle_dir, more, run)
    (run / "run.json").unlink()
    with pytest.raises(RunMismatchError, match="holds rows but no run"):
        segment(bundle_dir, bucket, run)


def test_bad_input_is_named_and_nothing_is_written(bundle_dir: Path, bucket: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(BundleError, match="no bundle at"):
        segment(tmp_path, bucket, output)
    with pytest.raises(MissingFileError, match=r"cannot list .*nowhere"):
        segment(bundle_dir, tmp_path / "nowhere", output)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no images under .*\*\.png"):
        segment(bundle_dir, tmp_path / "empty", output, masks=False)
    assert not output.exists()


def test_damaged_weights_stop_the_run_with_one_line(bundle_dir: Path, bucket: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    weights = bytearray((bundle / "model.safetensors").read_bytes())
    weights[5000] ^= 1
    (bundle / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"model\.safetensors: damaged"):
        segment(bundle, bucket, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fault_of_the_world_is_no_error_row_and_the_next_call_goes_on(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    blocked = output / "images" / "part-00000001.parquet"
    (blocked / "in the way").mkdir(parents=True)  # a folder where a file has to go: the write fails, whoever we are
    with pytest.raises(StorageError, match=r"cannot write .*part-00000001\.parquet"):
        segment(bundle_dir, bucket, output)
    assert json.loads((output / "run.json").read_text())["status"] == "running"
    shutil.rmtree(blocked)
    assert segment(bundle_dir, bucket, output).num_ok == NUM_IMAGES
    assert read_rows(output) == read_rows(finished)
