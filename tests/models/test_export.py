"""Exported files give the masks of the original model, without segray, at any batch size and image size."""

import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from segray.config import ExportFormat, ModelConfig
from segray.data.images import resize_image
from segray.data.preprocessing import Preprocessing
from segray.data.synthetic import draw_shape
from segray.errors import BundleError, ConfigError
from segray.models import export, fcn
from segray.models.build import build_model
from segray.models.bundle import Bundle, BundleDescription, load_bundle, save_bundle
from segray.models.export import TOLERANCE, DeployableModel, compute_agreement, export_bundle
from segray.models.prediction import compute_mask
from tests.conftest import PET_CLASSES, SHAPE_SIZE
from tests.test_cli import run

Program = Callable[[torch.Tensor], torch.Tensor]
ONNX, TORCH_EXPORT = ExportFormat.ONNX, ExportFormat.TORCH_EXPORT
GUIDE = Path(__file__).parents[2] / "docs/guides/export.md"
PREPROCESSING = Preprocessing(mean=(120.0, 100.0, 80.0), std=(60.0, 50.0, 70.0))  # Not the default.

_RUN_WITHOUT_SEGRAY = """
import sys
sys.modules["segray"] = None  # As if segray were not installed.
import numpy as np, torch
program = torch.export.load(sys.argv[1]).module()
np.save(sys.argv[3], program(torch.from_numpy(np.load(sys.argv[2]))).numpy())
assert not any(name.startswith(("segray.", "segmentation_models_pytorch")) for name in sys.modules)
"""


def draw(num_images: int, size: tuple[int, int]) -> torch.Tensor:
    """Return drawn images (N, H, W, 3) uint8."""
    drawings = [np.asarray(draw_shape(100 + seed, max(size))[0]) for seed in range(num_images)]
    return torch.from_numpy(np.stack([resize_image(drawing, size) for drawing in drawings]))


def open_onnx(path: Path) -> Program:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image_nhwc: torch.from_numpy(session.run(None, {"image": image_nhwc.numpy()})[0])


def open_torch_export(path: Path) -> Program:
    program: Program = torch.export.load(str(path)).module()
    return program


OPEN = {ONNX: open_onnx, TORCH_EXPORT: open_torch_export}


def compute_logits(bundle: Bundle, image_nhwc: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits_nchw: torch.Tensor = bundle.model(bundle.manifest.preprocessing.apply(image_nhwc))
    return logits_nchw


def assert_equal_where_decided(mask: torch.Tensor, logits_chw: torch.Tensor, size: tuple[int, int]) -> None:
    """Assert that a mask equals that of the resized logits wherever their two highest values differ enough."""
    expected = compute_mask(logits_chw, size)
    resized = torch.nn.functional.interpolate(logits_chw[None], size=size, mode="bilinear")[0]
    highest, second = resized.topk(2, 0).values
    decided = highest - second > TOLERANCE * logits_chw.abs().max()
    assert decided.float().mean() > 0.95
    assert torch.equal(mask[decided], expected[decided])


def save_mixed_bundle(folder: Path, size: tuple[int, int], **model: object) -> None:
    """Write a bundle of random weights; subtracting mean logits in the last bias makes all classes occur in masks."""
    config = ModelConfig.model_validate({"encoder_name": "vgg11_bn", **model})
    torch.manual_seed(1)
    network = build_model(config, PET_CLASSES.num_classes)
    images = PREPROCESSING.apply(draw(3, size))
    scores = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == 3]
    bias = scores[-1].bias
    assert bias is not None
    with torch.no_grad():
        for _ in range(2):
            network.train()(images)
        bias -= network.eval()(images).mean((0, 2, 3))
    save_bundle(str(folder), network.state_dict(), BundleDescription(config, PET_CLASSES, size, PREPROCESSING))


@pytest.fixture
def short_lived_folder() -> Iterator[Path]:
    """A folder that is deleted after the test, unlike pytest's own, because bundles are large."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def unet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net bundle exported to both formats; its image size is not a multiple of the network's stride."""
    folder = tmp_path_factory.mktemp("unet")
    save_mixed_bundle(folder, (72, 104), arch="unet", encoder_name="tu-test_resnet")
    for export_format in ExportFormat:
        export_bundle(str(folder), export_format)
    return folder


@pytest.mark.integration
@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"arch": "deeplabv3plus", "encoder_name": "tu-test_resnet"}, id="deeplabv3plus"),
        pytest.param({"arch": "fcn8s", "encoder_name": "vgg11"}, id="fcn8s", marks=pytest.mark.slow),
        pytest.param({"arch": "segnet", "encoder_name": "vgg11_bn"}, id="segnet", marks=pytest.mark.slow),
        pytest.param({"arch": "segformer", "encoder_name": "mit_b0"}, id="segformer", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_architecture_gives_the_original_masks(
    short_lived_folder: Path, model: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcn, "_CLASSIFIER_CHANNELS", 64)  # With 4096 channels, it takes half a gigabyte.
    size = (64, 96)
    save_mixed_bundle(short_lived_folder, size, **model)
    bundle, images = load_bundle(str(short_lived_folder)), draw(2, size)
    expected = compute_logits(bundle, images)
    assert (expected.argmax(1).flatten().bincount(minlength=3) > 0.02 * expected[:, 0].numel()).sum() >= 2
    for export_format in ExportFormat:
        exported = export_bundle(str(short_lived_folder), export_format)
        found = OPEN[export_format](Path(exported.uri))(images)
        agreement = compute_agreement(found, expected)
        assert exported.agreement.num_pixels == 4 * size[0] * size[1]
        if model["arch"] == "segnet" and export_format is ONNX:  # Pooling indices differ where values tie.
            assert max(agreement.num_off, agreement.num_other_class) < 0.05 * agreement.num_pixels
            continue
        assert (agreement.num_off, exported.agreement.num_off) == (0, 0)
        for logits, expected_logits in zip(found, expected, strict=True):
            assert_equal_where_decided(logits.argmax(0), expected_logits, size)


@pytest.mark.parametrize("export_format", ExportFormat)
@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_any_batch_size_gives_masks_at_the_images_own_sizes(
    unet_dir: Path, export_format: ExportFormat, num_images: int
) -> None:
    bundle, program = load_bundle(str(unet_dir)), OPEN[export_format](unet_dir / export_format.file_name)
    sizes = [(72, 104), (150, 131), (40, 60), (301, 97), (64, 200)][:num_images]
    drawings = [draw(1, size)[0] for size in sizes]
    images = torch.from_numpy(np.stack([resize_image(drawing.numpy(), (72, 104)) for drawing in drawings]))
    expected = compute_logits(bundle, images)
    logits = program(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    for found_chw, expected_chw, size in zip(logits, expected, sizes, strict=True):
        assert_equal_where_decided(compute_mask(found_chw, size), expected_chw, size)


@pytest.mark.parametrize("size", [(150, 131), (40, 60), (72, 104)])
def test_the_code_in_the_export_guide_gives_the_masks_of_segray(
    unet_dir: Path, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n([^`]*onnxruntime[^`]*)```", GUIDE.read_text())
    (tmp_path / "model.onnx").symlink_to(unet_dir / "model.onnx")
    image = draw(1, size)[0]
    Image.fromarray(image.numpy()).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace("photo.jpg", "photo.png"), names)
    assert isinstance(names["mask"], np.ndarray)
    small = torch.from_numpy(resize_image(image.numpy(), (72, 104)).copy())
    (expected,) = compute_logits(load_bundle(str(unet_dir)), small[None])
    assert_equal_where_decided(torch.from_numpy(names["mask"]), expected, size)


def test_exported_files_include_the_bundles_normalisation(unet_dir: Path) -> None:
    bundle, images = load_bundle(str(unet_dir)), draw(1, (72, 104))
    with torch.inference_mode():
        other = bundle.model(Preprocessing().apply(images))
    for export_format, open_program in OPEN.items():
        found = open_program(unet_dir / export_format.file_name)(images)
        assert compute_agreement(found, compute_logits(bundle, images)).num_off == 0
        assert compute_agreement(found, other).num_off > 0.5 * other[:, 0].numel()


def test_an_onnx_export_is_one_file_with_named_inputs_and_outputs(unet_dir: Path) -> None:
    session = onnxruntime.InferenceSession(str(unet_dir / "model.onnx"), providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", 72, 104, 3])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 3, 72, 104])
    assert {path.name for path in unet_dir.iterdir()} == {"model.onnx", "model.pt2", "model.safetensors", "bundle.json"}


@pytest.mark.integration
def test_a_torch_export_file_runs_without_segray(unet_dir: Path, tmp_path: Path) -> None:
    images = draw(3, (72, 104))
    np.save(tmp_path / "images.npy", images.numpy())
    paths = [str(unet_dir / "model.pt2"), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", _RUN_WITHOUT_SEGRAY, *paths], check=True, cwd=tmp_path)
    expected = compute_logits(load_bundle(str(unet_dir)), images)
    assert compute_agreement(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected).num_off == 0


def test_agreement_counts_pixels_beyond_the_tolerance_and_differing_masks() -> None:
    expected = torch.tensor([[10.0, 4.0], [0.0, 5.0]])[None, :, None]  # Two classes, two pixels.
    assert compute_agreement(expected + 0.009, expected)[:3] == (2, 0, 0)
    assert compute_agreement(expected - torch.tensor([0.02, 0.0]), expected)[:3] == (2, 1, 0)
    assert compute_agreement(expected.flip(1), expected)[:3] == (2, 2, 2)
    assert compute_agreement(expected * torch.tensor([torch.nan, 1.0]), expected).num_off == 1
    with pytest.raises(ValueError, match=r"logits have shape \(1, 2, 1, 1\), expected \(1, 2, 1, 2\)"):
        compute_agreement(expected[..., :1], expected)


@pytest.mark.parametrize("export_format", ExportFormat)
def test_a_program_that_does_not_match_the_original_is_not_written(
    bundle_dir: Path, tmp_path: Path, export_format: ExportFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_to_normalise(model: DeployableModel, image: torch.Tensor) -> torch.Tensor:
        logits_nchw: torch.Tensor = model.model(image.float().permute(0, 3, 1, 2) / 255)
        return logits_nchw

    monkeypatch.setattr(DeployableModel, "forward", forget_to_normalise)
    with pytest.raises(BundleError, match=r"classic_unet exported to .* does not match .*; nothing was written; try"):
        export_bundle(str(bundle_dir), export_format, str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("export_format", ExportFormat)
def test_a_model_that_cannot_be_exported_is_one_error_line(
    bundle_dir: Path,
    tmp_path: Path,
    export_format: ExportFormat,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def depend_on_pixels(model: DeployableModel, image: torch.Tensor) -> torch.Tensor:
        logits_nchw: torch.Tensor = model.model(image.float().permute(0, 3, 1, 2))
        return logits_nchw if image.max() > 3 else -logits_nchw

    monkeypatch.setattr(DeployableModel, "forward", depend_on_pixels)
    assert run("export", str(bundle_dir), "--format", export_format, "--output", str(tmp_path / "file")) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {bundle_dir}: classic_unet cannot be exported to {export_format}: ")
    assert "data-dependent" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "file").exists()


def test_output_of_the_exporters_does_not_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("some.exporter")
    handler = logging.StreamHandler()  # Like torch's handler, it was created before output is suppressed.
    logger.addHandler(handler)
    with export._silenced():
        print("printed")
        warnings.warn("warned", stacklevel=1)
        logger.error("logged")
    assert capfd.readouterr() == ("", "")
    logger.error("logged later")
    logger.removeHandler(handler)
    assert capfd.readouterr().err == "logged later\n"


def test_weights_too_large_for_an_onnx_file_raise(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_MAX_ONNX_BYTES", 1_000)
    with pytest.raises(BundleError, match=r"0\.0 GB of weights exceed the 2 GB .*; try --format torch_export"):
        export_bundle(str(bundle_dir), ONNX, "/nowhere/model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_and_only_needed_for_onnx(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"--format onnx needs {package}, .*: pip install 'segray\[export\]'$"):
        export_bundle(f"{tmp_path}/none", ONNX)
    with pytest.raises(BundleError, match=f"no bundle at {tmp_path}/none"):
        export_bundle(f"{tmp_path}/none", TORCH_EXPORT)


@pytest.mark.parametrize("export_format", ExportFormat)
def test_the_command_prints_one_line_about_the_file(
    bundle_dir: Path, tmp_path: Path, export_format: ExportFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "a model"
    output = f"file://{tmp_path}/new/a%20model"
    assert run("export", str(bundle_dir), "--format", export_format, "--output", output) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    kind = r"ONNX opset \d+" if export_format is ONNX else r"torch\.export of torch \S+"
    size_mb, num_pixels = f"{path.stat().st_size / 1e6:.1f}", 4 * SHAPE_SIZE**2
    assert re.fullmatch(
        rf"exported: {output} \({size_mb} MB, {kind}\), compared with the original model at "
        rf"{num_pixels} pixels: masks (equal|differ at \d), logits differ by at most \d\.\de.\d\d\n",
        printed.out,
    )
    images = draw(2, (SHAPE_SIZE, SHAPE_SIZE))
    expected = compute_logits(load_bundle(str(bundle_dir)), images)
    assert compute_agreement(OPEN[export_format](path)(images), expected).num_off == 0
    assert not (bundle_dir / export_format.file_name).exists()
