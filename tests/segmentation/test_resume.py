"""End-to-end tests of resuming on Ray: a rerun resumes a run, and the folder of another run is refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from segray.errors import BundleError, DataError, MissingFileError, RunMismatchError, StorageError
from tests.segmented import NUM_IMAGES, SETTINGS, read_rows, segment

pytestmark = pytest.mark.usefixtures("ray_session")


def read_files(output: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(output)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


def test_rerunning_a_complete_run_writes_nothing(finished: Path, bundle_dir: Path, bucket: Path) -> None:
    before = read_files(finished)
    outcome = segment(bundle_dir, bucket, finished)
    assert read_files(finished) == before
    assert outcome.num_ok == NUM_IMAGES


def test_only_a_lost_fragment_is_processed_again_and_gets_the_same_bytes(
    finished: Path, bundle_dir: Path, bucket: Path
) -> None:
    before = read_files(finished)
    lost = "images/part-00000001.parquet"
    (finished / lost).unlink()
    segment(bundle_dir, bucket, finished)
    after = read_files(finished)
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert {name for name in after if after[name][1] != before[name][1]} == {lost, "run.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"settings": SETTINGS.model_copy(update={"batch_size": 4})},
            r"segment\.batch_size: the run has 3, got 4; .*allow_mixed=true",
        ),
        (
            {"settings": SETTINGS.model_copy(update={"mask_encoding": "png", "allow_mixed": True})},
            r"segment\.mask_encoding: the run has 'raw', got 'png'",
        ),
        ({"masks": False}, r"segment\.ground_truth: the run has True, got False"),
    ],
)
def test_the_folder_of_a_run_with_other_settings_is_refused(
    finished: Path, bundle_dir: Path, bucket: Path, change: dict[str, Any], message: str
) -> None:
    before = read_files(finished)
    with pytest.raises(RunMismatchError, match=message):
        segment(bundle_dir, bucket, finished, **change)
    assert read_files(finished) == before


def test_the_folder_of_a_run_with_another_bundle_is_refused(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "metrics": {"epoch": 2}}))
    with pytest.raises(RunMismatchError, match=r"belongs to another run \(different bundle\); choose another --output"):
        segment(bundle, bucket, finished)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "run.json").unlink()
    with pytest.raises(RunMismatchError, match=r"holds rows, but no run\.json"):
        segment(bundle_dir, bucket, run)


@pytest.fixture(scope="module")
def saved_run_with_errors(
    bundle_dir: Path, bucket: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A copy of the bucket with one damaged image and one missing mask with its complete run, and a backup of both."""
    folder, backup = (tmp_path_factory.mktemp("run_with_errors") / name for name in ("folder", "backup"))
    copy = Path(shutil.copytree(bucket, folder / "bucket"))
    (copy / "images" / "image 4#.png").write_bytes(b"broken")
    (copy / "masks" / "sub" / "image 7#.png").unlink()
    outcome = segment(bundle_dir, copy, folder / "run")
    assert outcome.errors == {"mask_missing": 1, "unreadable": 1}
    shutil.copytree(folder, backup)
    return folder, backup


@pytest.fixture
def run_with_errors(saved_run_with_errors: tuple[Path, Path]) -> tuple[Path, Path]:
    """The bucket and the run of ``saved_run_with_errors``, restored with their modification times."""
    folder, backup = saved_run_with_errors
    shutil.rmtree(folder)
    shutil.copytree(backup, folder)
    return folder / "bucket", folder / "run"


def test_a_changed_listing_is_refused_with_its_differences_unless_relist_is_off(
    run_with_errors: tuple[Path, Path], bundle_dir: Path
) -> None:
    images, run = run_with_errors[0] / "images", run_with_errors[1]
    before = read_files(run)
    shutil.copy(images / "image 2#.png", images / "image 1#.png")
    (images / "sub" / "image 3#.png").unlink()
    (images / "image 2#.png").write_bytes((images / "image 2#.png").read_bytes() + b" ")
    message = (
        r"different listing: 1 added, 1 removed, 1 changed; .*image 1#\.png was added.*relist=false, or choose another"
    )
    with pytest.raises(RunMismatchError, match=message):
        segment(bundle_dir, run_with_errors[0], run)
    assert read_files(run) == before
    frozen = SETTINGS.model_copy(update={"relist": False})
    assert segment(bundle_dir, run_with_errors[0], run, settings=frozen).num_ok == NUM_IMAGES - 2
    assert read_files(run) == before
    with pytest.raises(RunMismatchError, match=r"images: the run has \[.*\], got \["):
        segment(bundle_dir, run_with_errors[0] / "..", run, settings=frozen)


def test_images_changed_after_the_listing_was_frozen_become_error_rows(
    run_with_errors: tuple[Path, Path], bundle_dir: Path
) -> None:
    images, run = run_with_errors[0] / "images", run_with_errors[1]
    (images / "image 0#.png").unlink()
    (images / "image 2#.png").write_bytes((images / "image 2#.png").read_bytes() + b" ")
    (run / "images" / "part-00000000.parquet").unlink()
    outcome = segment(bundle_dir, run_with_errors[0], run, settings=SETTINGS.model_copy(update={"relist": False}))
    assert outcome.errors == {"changed": 1, "mask_missing": 1, "missing": 1, "unreadable": 1}


def test_retry_errors_accepts_only_changes_to_images_with_error_rows(
    run_with_errors: tuple[Path, Path], finished: Path, bundle_dir: Path, bucket: Path
) -> None:
    images, run = run_with_errors[0] / "images", run_with_errors[1]
    shutil.copy(bucket / "images" / "image 4#.png", images / "image 4#.png")
    shutil.copy(bucket / "masks" / "sub" / "image 7#.png", run_with_errors[0] / "masks" / "sub" / "image 7#.png")
    with pytest.raises(RunMismatchError, match="different listing: 2 changed"):
        segment(bundle_dir, run_with_errors[0], run)
    before = read_files(run)
    retry = SETTINGS.model_copy(update={"retry_errors": True})
    outcome = segment(bundle_dir, run_with_errors[0], run, settings=retry)
    assert (outcome.num_ok, outcome.errors) == (NUM_IMAGES, {})
    after = read_files(run)
    parts = [name for name in before if name.startswith("images/")]
    assert [before[name] != after[name] for name in parts] == [True, False, True]
    for row, other in zip(read_rows(run), read_rows(finished), strict=True):
        assert row.pop("uri").removeprefix(str(run_with_errors[0])) == other.pop("uri").removeprefix(str(bucket))
        assert row == other
    assert segment(bundle_dir, run_with_errors[0], run).errors == {}  # The folder is bound to the new listing now.
    assert segment(bundle_dir, run_with_errors[0], run, settings=retry).errors == {}
    assert read_files(run) == after
    (images / "image 4#.png").write_bytes(b"broken again")  # It is not an error row any more, so it must not change.
    with pytest.raises(RunMismatchError, match=r"different listing: 1 changed; .*image 4#\.png was changed"):
        segment(bundle_dir, run_with_errors[0], run, settings=retry)


def test_unusable_input_is_named_and_nothing_is_written(bundle_dir: Path, bucket: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(BundleError, match="no bundle at"):
        segment(tmp_path, bucket, output)
    with pytest.raises(MissingFileError, match=r"cannot list .*nowhere"):
        segment(bundle_dir, tmp_path / "nowhere", output)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no images under .*\*\.png"):
        segment(bundle_dir, tmp_path / "empty", output, masks=False)
    assert not output.exists()


def test_damaged_weights_are_refused_before_anything_is_written(bundle_dir: Path, bucket: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    weights = bytearray((bundle / "model.safetensors").read_bytes())
    weights[5000] ^= 1
    (bundle / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"model\.safetensors: damaged"):
        segment(bundle, bucket, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_environment_error_stops_the_run_and_a_rerun_completes_it(
    finished: Path, bundle_dir: Path, bucket: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    blocked = output / "images" / "part-00000001.parquet"
    (blocked / "in the way").mkdir(parents=True)  # A folder in place of the file: writing fails even for root.
    with pytest.raises(StorageError, match=r"cannot write .*part-00000001\.parquet"):
        segment(bundle_dir, bucket, output)
    assert json.loads((output / "run.json").read_text())["status"] == "running"
    shutil.rmtree(blocked)
    assert segment(bundle_dir, bucket, output).num_ok == NUM_IMAGES
    assert read_rows(output) == read_rows(finished)
