"""Bundles: read elsewhere to the last bit, refused when anything about them is wrong."""

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
bundle = load_bundle(sys.argv[1])
with torch.no_grad():
    np.save(sys.argv[3], bundle.model(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


@pytest.fixture
def copy(bundle_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "copy"))


def test_a_fresh_process_gets_the_same_logits_bit_for_bit(bundle_dir: Path, tmp_path: Path) -> None:
    image = torch.randn(2, 3, SHAPE_SIZE, SHAPE_SIZE)
    np.save(tmp_path / "image.npy", image.numpy())
    arguments = [str(bundle_dir), str(tmp_path / "image.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", _PREDICT, *arguments], check=True)
    with torch.no_grad():
        here = load_bundle(str(bundle_dir)).model(image).numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), here)


def test_a_bundle_carries_what_segmenting_needs(bundle_dir: Path) -> None:
    bundle = load_bundle(str(bundle_dir))
    assert bundle.manifest.classes == PET_CLASSES
    assert bundle.manifest.ignore_index == 255
    assert bundle.manifest.image_size == (SHAPE_SIZE, SHAPE_SIZE)
    assert not bundle.model.training
    assert bundle.manifest.versions["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_a_flipped_byte_is_refused(copy: Path, position: int) -> None:
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[position] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"model\.safetensors: damaged, sha256"):
        load_bundle(str(copy))


def test_another_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(BundleError, match=r"bundle format 99, this segray reads 1; .*train again"):
        load_bundle(str(copy))


def test_what_is_incomplete_or_damaged_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"no bundle at {tmp_path}/none"):
        load_bundle(f"{tmp_path}/none")
    (copy / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"incomplete, model\.safetensors is missing"):
        load_bundle(str(copy))
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps({**manifest, "image_size": "large"}))
    with pytest.raises(BundleError, match="damaged at image_size"):
        load_bundle(str(copy))
    (copy / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        load_bundle(str(copy))


def test_weights_of_another_network_are_named(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["model"]["encoder_name"] = "resnet34"
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="do not fit unet on resnet34"):
        load_bundle(str(copy))
