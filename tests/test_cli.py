"""Tests of segray.cli: every mistake gives one line with the remedy, an exit code, and no output files."""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from segray import cli
from tests.conftest import SHAPE_SIZE


def run(*arguments: str) -> int:
    """Run `segray ARGUMENTS` like the installed command, and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: cli.app(list(arguments)))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_version_is_printed_without_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"segray {version('segray')}\n"


@pytest.fixture
def config(tmp_path: Path, shapes_root: Path) -> Path:
    path = tmp_path / "config.yaml"
    root = shutil.copytree(shapes_root, tmp_path / "shapes")
    values = {
        "data": {"layout": {"oxford_iiit_pet": {"root": str(root)}}},
        "image_size": [SHAPE_SIZE, SHAPE_SIZE],
        "output": str(tmp_path / "output"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("override", "exit_code", "message"),
    [
        (
            "data.layout.oxford_iiit_pet.root=/nowhere",
            4,
            "cannot read /nowhere/annotations/trainval.txt: no such file or folder",
        ),
        ("trian.num_epochs=3", 2, "trian: unknown setting; did you mean train?"),
        ("model.arch=unett", 2, "model.arch: unknown architecture 'unett'; choose from classic_unet, fcn32s"),
        ("model.encoder_name=resnet19", 2, "model.encoder_name: unknown encoder 'resnet19'"),
        ("train.num_epochs=-1", 2, "train.num_epochs"),
        ("output=nostore://x/y", 4, "cannot open nostore://x"),
    ],
)
def test_a_wrong_setting_gives_one_line(
    config: Path, override: str, exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", str(config), "--set", override) == exit_code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (config.parent / "output").exists()


def test_a_missing_configuration_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", str(tmp_path / "none.yaml")) == 4
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path}/none.yaml")


@pytest.mark.usefixtures("ray_session")
def test_check_lists_every_problem_with_its_remedy(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", str(config)) == 0
    assert "25 images and masks checked, 0 faults" in capsys.readouterr().out
    root = config.parent / "shapes"
    (root / "images" / "disc_0.jpg").write_bytes(b"")
    (root / "annotations" / "trimaps" / "star_3.png").unlink()
    assert run("check", str(config), "--set", "data.class_values=[1, 2, 9]") == 1
    printed = capsys.readouterr().out
    assert f"{root}/images/disc_0.jpg: unreadable: empty file" in printed
    assert f"{root}/annotations/trimaps/star_3.png: mask_missing: no mask at" in printed
    assert f"{root}/annotations/trimaps/square_1.png: mask_mismatch: mask value 3 is not declared" in printed
    assert f"{root}/annotations/trimaps/disc_0.png: mask_mismatch" in printed  # Its image is broken as well.
    assert "25 images and masks checked, 26 faults" in printed
    assert all(";" in line for line in printed.splitlines() if line.startswith(str(root)))
    remedy = "the masks hold as many values as there are classes: set data.class_values: [1, 2, 3]"
    assert f"24 x mask_mismatch: {remedy}\n1 x unreadable: replace the file, or remove it\n" in printed


@pytest.fixture
def folders(tmp_path: Path, labelled_folders: tuple[Path, Path]) -> Path:
    """Write a configuration for two paired folders, whose masks hold 0, 1 and the ignored 255; return its path."""
    both = {"images": str(labelled_folders[0]), "masks": str(labelled_folders[1])}
    data = {"train": both, "val": {"fraction": 0.4}, "class_names": ["a", "b"], "ignore_values": [255]}
    path = tmp_path / "folders.yaml"
    path.write_text(yaml.safe_dump({"data": data, "image_size": [32, 32], "output": str(tmp_path / "output")}))
    return path


@pytest.mark.usefixtures("ray_session")
def test_problems_of_paired_folders_are_listed_by_check_and_refused_by_train(
    folders: Path, labelled_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = labelled_folders
    assert run("check", str(folders)) == 0
    Image.new("L", (3, 4)).save(masks / "0.png")
    assert run("train", str(folders)) == 1
    expected = (
        f"{masks}/0.png: mask_mismatch: mask of 3x4 pixels for an image of 50x40; save the mask at the image's size"
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    (masks / "2.png").rename(masks / "other.png")
    assert run("check", str(folders)) == 1
    printed = capsys.readouterr().out
    assert expected in printed
    assert f"{images}/2.png: no mask of this name; add it" in printed
    assert f"{masks}/other.png: no image of this name; add it" in printed
    assert run("train", str(folders)) == 1
    assert "2 files have no matching mask or image (segray check lists all)" in capsys.readouterr().err
    assert run("train", str(folders), "--set", f"data.train.masks={images.parent}/empty") == 4
    (images.parent / "empty").mkdir()
    assert run("train", str(folders), "--set", f"data.train.masks={images.parent}/empty") == 1
    assert "no image has a mask: 5 images under" in capsys.readouterr().err
    assert not list((folders.parent / "output").iterdir())


@pytest.mark.usefixtures("ray_session")
def test_check_prints_warnings_but_succeeds(
    folders: Path, labelled_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = labelled_folders
    assert run("check", str(folders)) == 0
    assert "5 images and masks checked, 0 faults, 0 warnings" in capsys.readouterr().out
    Image.new("L", Image.open(images / "0.png").size, 255).save(masks / "0.png")
    shutil.copytree(images, images.parent / "val")
    split = f"data.val={{images: {images.parent}/val, masks: {masks}}}"
    assert run("check", str(folders), "--set", split) == 0
    printed = capsys.readouterr().out
    assert f"warning: {masks}/0.png: all_ignored: every pixel is ignored" in printed
    assert f"warning: {images.parent}/val/2.png: duplicate: same pixels as {images}/2.png in train; keep" in printed
    assert "5 x warning: duplicate: keep it in one split" in printed
    assert "10 images and masks checked, 0 faults, 7 warnings" in printed
    for path in masks.rglob("*.png"):
        Image.new("L", Image.open(path).size, 255).save(path)
    assert run("check", str(folders)) == 1
    assert "error: train: every pixel of its 3 masks is ignored" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_session")
def test_check_draws_augmented_samples_only_if_there_are_no_problems(
    folders: Path, labelled_folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", str(folders), "--draw", "3") == 0
    default, other = tmp_path / "output" / "augmented.png", tmp_path / "sub" / "other.png"
    assert f"augmented samples: {default}\n" in capsys.readouterr().out
    assert sorted(path.name for path in default.parent.iterdir()) == ["augmented.png", "labels.json"]
    assert run("check", str(folders), "--draw", "4", "--draw-to", str(other)) == 0
    assert f"augmented samples: {other}\n" in capsys.readouterr().out
    assert Image.open(other).height > Image.open(default).height
    shutil.rmtree(default.parent)
    other.unlink()
    shutil.copy(labelled_folders[1] / "0.png", labelled_folders[1] / "of_no_image.png")  # The drawn samples are fine.
    assert run("check", str(folders), "--draw", "3") == 1
    assert run("check", str(folders), "--draw", "3", "--draw-to", str(other)) == 1
    assert "augmented samples" not in capsys.readouterr().out
    assert not default.parent.exists()
    assert not other.exists()


def test_a_draw_target_without_samples_or_too_many_samples_are_refused(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", str(folders), "--draw-to", "x.png") == 2
    assert "--draw-to requires --draw N, the number of samples to draw" in capsys.readouterr().err
    assert run("check", str(folders), "--draw", "33") == 2


def test_segmenting_with_unpaired_masks_is_refused_before_it_starts(
    bundle_dir: Path, labelled_folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "others").mkdir()
    Image.new("L", (3, 4)).save(tmp_path / "others" / "none.png")
    arguments = ["--bundle", str(bundle_dir), "--images", str(labelled_folders[0]), "--output", str(tmp_path / "run")]
    assert run("segment", *arguments, "--masks", str(tmp_path / "others")) == 1
    assert "no image has a mask: 5 images under" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wrong_options_of_segment_are_refused_before_it_starts(
    bundle_dir: Path, labelled_folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "run")
    arguments = ["--bundle", str(bundle_dir), "--images", str(labelled_folders[0]), "--output", output]
    assert run("segment", *arguments, "--limit", "0") == 2
    capsys.readouterr()
    assert run("segment", *arguments, "--exclude", str(tmp_path / "none")) == 4
    assert capsys.readouterr().err.startswith(f"error: no run at {tmp_path}/none: there is no run.json")
    assert run("segment", *arguments, "--exclude", output) == 2
    assert f"--exclude {output} is the --output of this run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("ray_session")
def test_too_many_error_rows_give_exit_code_3_after_all_rows_are_written(
    bundle_dir: Path, labelled_folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = labelled_folders[0]
    (images / "0.png").write_bytes(b"")
    output = tmp_path / "run"
    arguments = ["--bundle", str(bundle_dir), "--images", str(images), "--output", str(output)]
    assert run("segment", *arguments) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1 of 5 images are error rows (20.0%), the limit is 1.0% (segment.max_error_fraction); all rows" in error
    for limit, expected in ((0.21, 0), (0.2, 3), (0.0, 3), (1, 0)):
        assert run("segment", *arguments, "--set", f"segment.max_error_fraction={limit}") == expected
    assert run("status", str(output)) == 0
    printed = capsys.readouterr().out
    assert "1 (1 unreadable)" in printed
    assert "5 images (100.0%)" in printed
    assert run("status", str(tmp_path)) == 4
    assert capsys.readouterr().err.startswith(f"error: no run at {tmp_path}")


def test_a_bundle_of_another_version_gives_one_line(
    bundle_dir: Path, labelled_folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "format_version": 99}))
    arguments = ["--bundle", str(bundle), "--images", str(labelled_folders[0]), "--output", str(tmp_path / "run")]
    assert run("segment", *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "bundle format 99, but this segray reads format 1" in error
    assert not (tmp_path / "run").exists()


def test_job_files_accept_the_arguments_of_the_verb_and_refuse_relative_paths(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # `ray job submit` sets it.
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", str(config), "--set", "output=runs/x"])
    with pytest.raises(SystemExit) as caught:
        cli.run_job("train")
    assert caught.value.code == 2
    assert "output: runs/x is a relative path" in capsys.readouterr().err
    assert run("segment", "--bundle", "/b", "--images", "images", "--output", "/o") == 2
    assert "--images: images is a relative path" in capsys.readouterr().err
    assert run("segment", "--bundle", "/b", "--images", "/i", "--output", "/o", "--exclude", "runs/x") == 2
    assert "--exclude: runs/x is a relative path" in capsys.readouterr().err


def test_the_demo_never_empties_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    assert run("demo", "--output", str(tmp_path)) == 2
    assert "not empty and not written by a demo; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()


def test_the_demo_with_only_data_writes_labelled_images(tmp_path: Path) -> None:
    assert run("demo", "--only-data", "--output", str(tmp_path / "shapes")) == 0
    names = (tmp_path / "shapes/annotations/trainval.txt").read_text().split()[::4]
    assert len(names) == 96
    assert all((tmp_path / "shapes/images" / f"{name}.jpg").exists() for name in names)


def test_a_mistake_in_exporting_gives_one_line(
    bundle_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("export", str(bundle_dir), "--format", "tflite") == 2
    assert "'tflite'" in capfd.readouterr().err
    assert run("export", str(bundle_dir)) == 2
    assert "--format" in capfd.readouterr().err
    assert run("export", str(tmp_path), "--format", "onnx") == 1
    assert capfd.readouterr().err == (
        f"error: no bundle at {tmp_path}: bundle.json not found; pass the bundle folder that segray train wrote\n"
    )
    assert run("export", str(bundle_dir), "--format", "torch_export", "--output", str(tmp_path)) == 4
    error = capfd.readouterr().err
    assert error.startswith(f"error: cannot write {tmp_path}")
    assert error.count("\n") == 1
