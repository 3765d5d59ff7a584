"""Bundles: loaded in another process with identical logits, and rejected if anything in them is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from segray.errors import BundleError
from segray.models.bundle import load_bundle
from tests.conftest import PET_CLASSES, SHAPE_SIZE

_PREDICT = """
import sys, numpy as np, torch
from segray.models.bundle import load_bundle
torch.set_num_threads(int(sys.argv[4]))  # Another number may change the last bits.
bundle = load_bundle(sys.argv[1])
with torch.no_grad():
    np.save(sys.argv[3], bundle.model(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


@pytest.fixture
def copy(bundle_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "copy"))


def test_a_new_process_computes_bit_identical_logits(bundle_dir: Path, tmp_path: Path) -> None:
    image = torch.randn(2, 3, SHAPE_SIZE, SHAPE_SIZE)
    np.save(tmp_path / "image.npy", image.numpy())
    arguments = [str(bundle_dir), str(tmp_path / "image.npy"), str(tmp_path / "logits.npy")]
    arguments.append(str(torch.get_num_threads()))
    subprocess.run([sys.executable, "-c", _PREDICT, *arguments], check=True)
    with torch.no_grad():
        here = load_bundle(str(bundle_dir)).model(image).numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), here)


def test_a_bundle_holds_everything_that_segmentation_needs(bundle_dir: Path) -> None:
    bundle = load_bundle(str(bundle_dir))
    assert bundle.manifest.classes == PET_CLASSES
    assert bundle.manifest.ignore_index == 255
    assert bundle.manifest.image_size == (SHAPE_SIZE, SHAPE_SIZE)
    assert not bundle.model.training
    assert bundle.manifest.versions["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_weights_with_a_flipped_bit_raise(copy: Path, position: int) -> None:
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[position] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"model\.safetensors: damaged: sha256 is"):
        load_bundle(str(copy))


def test_another_format_version_raises(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(BundleError, match=r"bundle format 99, but this segray reads format 1; .*train again"):
        load_bundle(str(copy))


def test_a_missing_or_damaged_file_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"no bundle at {tmp_path}/none"):
        load_bundle(f"{tmp_path}/none")
    (copy / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"incomplete: model\.safetensors is missing"):
        load_bundle(str(copy))
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps({**manifest, "image_size": "large"}))
    with pytest.raises(BundleError, match="damaged at image_size"):
        load_bundle(str(copy))
    (copy / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        load_bundle(str(copy))


def test_weights_that_do_not_fit_the_network_raise(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["model"]["widths"] = [8, 24]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="do not fit classic_unet"):
        load_bundle(str(copy))
