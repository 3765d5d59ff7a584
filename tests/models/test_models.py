"""One contract for all architectures; FCN, SegNet and the original U-Net compared with their sources."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision.models import VGG, vgg16

from segray.config import ModelConfig
from segray.data.preprocessing import Preprocessing
from segray.errors import ConfigError
from segray.models import build, fcn
from segray.models.build import (
    ARCHITECTURES,
    SMP_ARCHITECTURES,
    build_model,
    check_model,
    freeze_unused_parameters,
)
from segray.models.fcn import FCN, build_bilinear_upsampling, load_fully_connected
from segray.models.input_size import EncoderFit, InputSize
from segray.models.segnet import SegNet

NUM_CLASSES = 4
SIZE = (128, 160)
ENCODERS = {
    "fcn32s": "vgg11",
    "fcn16s": "vgg11_bn",
    "fcn8s": "vgg11",
    "segnet": "vgg11_bn",
    "dpt": "tu-test_vit",
}
_BUILD_CLASSIC_UNET = """
import sys
from segray.config import ModelConfig
from segray.models import build, bundle, export, fuse_batchnorm, losses
config = ModelConfig(arch="classic_unet", widths=(4, 8))
build.check_model(config, 2, (32, 32))
build.build_model(config, 2)
print(*sys.modules)
"""


@pytest.fixture(autouse=True)
def _omit_large_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep FCN's classifier narrow, and omit that of VGG, which smp removes: 100 million random weights."""

    def initialise(vgg: VGG, features: nn.Module) -> None:
        nn.Module.__init__(vgg)
        vgg.features, vgg.avgpool, vgg.classifier = features, nn.Identity(), nn.Identity()

    monkeypatch.setattr(fcn, "_CLASSIFIER_CHANNELS", 64)
    monkeypatch.setattr(VGG, "__init__", initialise)


def test_building_a_classic_unet_imports_neither_smp_nor_timm() -> None:
    code = [sys.executable, "-c", _BUILD_CLASSIC_UNET]
    loaded = subprocess.run(code, check=True, capture_output=True, text=True).stdout.split()
    assert not {"segmentation_models_pytorch", "timm", "torchvision"} & set(loaded)


def test_the_listed_smp_architectures_are_all_that_smp_has() -> None:
    assert tuple(smp.MODEL_ARCHITECTURES_MAPPING) == SMP_ARCHITECTURES


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_maps_any_size_to_logits_of_that_size_and_has_gradients(arch: str) -> None:
    config = ModelConfig(arch=arch, encoder_name=ENCODERS.get(arch, "resnet18"), widths=(8, 16, 32, 64, 128))
    torch.manual_seed(0)
    model = build_model(config, NUM_CLASSES).train()
    freeze_unused_parameters(model)
    size = (129, 131) if arch == "pan" else (65, 97)  # PAN halves its smallest features three more times.
    image = torch.randn(2, 3, *size)
    logits = model(image)
    assert logits.shape == (2, NUM_CLASSES, *size)
    logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DistributedDataParallel would wait forever for a missing gradient.
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(image)).all()
        torch.testing.assert_close(model(image[:1]), model(image)[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("encoder_name", ["vgg16", "vgg16_bn", "mobilenet_v2", "efficientnet-b0"])
def test_a_unet_supports_other_encoders(encoder_name: str) -> None:
    model = build_model(ModelConfig(encoder_name=encoder_name), NUM_CLASSES).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 33)).shape == (1, NUM_CLASSES, 40, 33)


def test_an_image_of_another_size_is_padded_with_its_edge_pixels() -> None:
    model = build_model(ModelConfig(), NUM_CLASSES).eval()
    image = torch.randn(1, 3, 40, 33)
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, 24), (0, 31)), mode="edge"))
    with torch.no_grad():
        assert torch.equal(model(image), model.network(padded)[..., :40, :33])


def test_an_image_whose_size_fits_is_not_padded() -> None:
    model = build_model(ModelConfig(), NUM_CLASSES).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(image), model.network(image))


def test_fcn_taps_equal_torchvisions_pooled_features() -> None:
    reference = vgg16(weights=None).eval()
    network = build_model(ModelConfig(arch="fcn8s", encoder_name="vgg16"), NUM_CLASSES).eval().network
    assert isinstance(network, FCN)
    network.encoder.load_state_dict(reference.state_dict())
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        taps = network.compute_taps(image)
        features, expected = image, []
        for layer in reference.features:
            features = layer(features)
            if isinstance(layer, nn.MaxPool2d):
                expected.append(features)
    assert [tuple(tap.shape[1:]) for tap in taps[2:]] == [(256, 12, 8), (512, 6, 4), (512, 3, 2)]
    for tap, pooled in zip(taps, expected, strict=True):
        assert torch.equal(tap, pooled)


def build_small_vgg_layers() -> tuple[nn.Sequential, nn.Sequential]:
    """Return VGG's fully connected layers, with 6 and 8 instead of 512 and 4096 channels, and FCN's convolutions."""
    linear = nn.Sequential(nn.Linear(6 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU())
    convolutions = nn.Sequential(
        nn.Conv2d(6, 8, 7, padding=3), nn.ReLU(), nn.Dropout2d(), nn.Conv2d(8, 8, 1), nn.ReLU()
    )
    return linear.eval(), convolutions.eval()


def test_fc6_and_fc7_compute_what_vggs_fully_connected_layers_compute() -> None:
    torch.manual_seed(0)
    linear, convolutions = build_small_vgg_layers()
    load_fully_connected(convolutions, {f"classifier.{name}": value for name, value in linear.state_dict().items()})
    features = torch.randn(2, 6, 7, 7)
    torch.testing.assert_close(convolutions(features)[:, :, 3, 3], linear(features.flatten(1)))


def test_a_vgg_without_fully_connected_layers_leaves_them_random_with_a_warning() -> None:
    _, convolutions = build_small_vgg_layers()
    before = {name: value.clone() for name, value in convolutions.state_dict().items()}
    with pytest.warns(UserWarning, match=r"has no classifier\.0\.weight; fc6 and fc7 start random"):
        load_fully_connected(convolutions, {"features.0.weight": torch.zeros(1)})
    assert all(torch.equal(value, before[name]) for name, value in convolutions.state_dict().items())


@pytest.mark.parametrize(("arch", "num_skips"), [("fcn32s", 0), ("fcn16s", 1), ("fcn8s", 2)])
def test_fcn_has_as_many_skips_as_its_name_implies(arch: str, num_skips: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(arch=arch, encoder_name="vgg11"), NUM_CLASSES)
    skips = [name for name, _ in model.network.named_children() if name.startswith("score_pool")]
    assert len(skips) == num_skips
    freeze_unused_parameters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())  # Each skip contributes to the logits.


@pytest.mark.parametrize("factor", [2, 8])
def test_fcn_upsampling_is_initialised_to_bilinear_interpolation(factor: int) -> None:
    scores = torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        upsampled = build_bilinear_upsampling(3, factor)(scores)
    expected = nn.functional.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
    inside = slice(factor, -factor)
    torch.testing.assert_close(upsampled[..., inside, inside], expected[..., inside, inside])


def build_segnet(encoder_name: str) -> SegNet:
    network = build_model(ModelConfig(arch="segnet", encoder_name=encoder_name), NUM_CLASSES).network
    assert isinstance(network, SegNet)
    return network


@pytest.mark.parametrize("encoder_name", ["vgg16_bn", "vgg11", "vgg19"])
def test_segnets_decoder_mirrors_its_encoder(encoder_name: str) -> None:
    with torch.device("meta"):
        network = build_segnet(encoder_name)
    encoder = [layer for layer in network.encoder.features if isinstance(layer, nn.Conv2d)]
    decoder = [layer for layer in network.decoder.modules() if isinstance(layer, nn.Conv2d)] + [network.head]
    mirrored = [(layer.out_channels, layer.in_channels) for layer in reversed(encoder)]
    assert mirrored[-1] == (64, 3)
    assert [(layer.in_channels, layer.out_channels) for layer in decoder] == [*mirrored[:-1], (64, NUM_CLASSES)]
    assert {layer.kernel_size for layer in decoder} == {(3, 3)}
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in network.decoder.modules()) == len(decoder) - 1


def test_segnet_unpools_each_value_to_the_position_of_the_maximum() -> None:
    torch.manual_seed(0)
    network = build_segnet("vgg11_bn").eval()
    pooled: list[torch.Tensor] = []
    features = image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for layer in network.encoder.features:
            if isinstance(layer, nn.MaxPool2d):
                pooled.append(features)
            features = layer(features)
        unpooled: list[torch.Tensor] = []
        for stage in network.decoder:
            stage.register_forward_pre_hook(lambda _, inputs: unpooled.append(inputs[0]))
        network(image)
    assert [tensor.shape for tensor in unpooled] == [tensor.shape for tensor in reversed(pooled)]
    for got, source in zip(unpooled, reversed(pooled), strict=True):
        highest = functional.max_pool2d(source, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert got.any()
        assert (source == highest)[got != 0].all()
        assert functional.avg_pool2d((got != 0).float(), 2).max() == 0.25  # One of every four values.
    deepest = pooled[-1]
    assert torch.equal(unpooled[0][unpooled[0] != 0], deepest[unpooled[0] != 0])
    assert torch.equal(functional.max_pool2d(unpooled[0], 2), features)


def compute_classic_unet(weights: dict[str, torch.Tensor], image: torch.Tensor, depth: int) -> torch.Tensor:
    """Compute the logits of the original U-Net with plain functions."""

    def convolve_twice(features: torch.Tensor, name: str) -> torch.Tensor:
        for number in (0, 3):
            mean, variance, factor, shift = (
                weights[f"{name}.{number + 1}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
            )
            features = functional.conv2d(features, weights[f"{name}.{number}.weight"], padding=1)
            features = functional.batch_norm(features, mean, variance, factor, shift).relu()
        return features

    features = convolve_twice(image, "encoder.0")
    skips = []
    for level in range(1, depth):
        skips.append(features)
        features = convolve_twice(functional.max_pool2d(features, 2), f"encoder.{level}")
    for number, skip in enumerate(reversed(skips)):
        up = functional.conv_transpose2d(
            features, weights[f"up.{number}.weight"], weights[f"up.{number}.bias"], stride=2
        )
        features = convolve_twice(torch.cat([skip, up], 1), f"decoder.{number}")
    return functional.conv2d(features, weights["head.weight"], weights["head.bias"])


@pytest.mark.parametrize("widths", [(4, 8), (4, 8, 12, 16), (2, 3, 4, 5, 6, 7)])
def test_the_classic_unet_equals_the_papers_network_with_the_configured_widths(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(arch="classic_unet", widths=widths), NUM_CLASSES).network
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        network.train()(image)  # This changes the BatchNorm statistics from their initial values.
        expected = compute_classic_unet(network.state_dict(), image, len(widths))
        torch.testing.assert_close(network.eval()(image), expected)
    for name, expected_widths in (("encoder", widths), ("decoder", widths[-2::-1])):
        levels = network.get_submodule(name).children()
        assert tuple(level.get_parameter("0.weight").shape[0] for level in levels) == expected_widths


def test_the_classic_unet_has_as_many_weights_as_in_the_tutorials() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(arch="classic_unet"), 2)
    widths, num_weights = (3, 64, 128, 256, 512, 1024), 2 * 64 + 2
    for before, width in pairwise(widths):
        num_weights += 9 * (before * width + width * width) + 2 * 2 * width
        if before > 3:  # In the decoder, channels are halved, then concatenated with a skip of equal width.
            num_weights += 4 * width * before + before + 9 * (width * before + before * before) + 2 * 2 * before
    assert sum(parameter.numel() for parameter in model.parameters()) == num_weights == 31_037_698


@pytest.mark.parametrize(("arch", "encoder_name"), [("unet", "resnet18"), ("segnet", "vgg11_bn")])
def test_a_frozen_encoder_keeps_weights_and_batchnorm_statistics(arch: str, encoder_name: str) -> None:
    model = build_model(ModelConfig(arch=arch, encoder_name=encoder_name, freeze_encoder=True), NUM_CLASSES)
    before = {name: value.clone() for name, value in model.network.get_submodule("encoder").state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    after = model.network.get_submodule("encoder").state_dict()
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for name, module in model.network.named_children() if name != "encoder")


def test_pretrained_weights_are_loaded_into_the_encoder(make_hub_snapshot: Callable[..., Path]) -> None:
    snapshot = make_hub_snapshot("vgg16", "imagenet")
    reference = vgg16(weights=None)
    linear = {"0.weight": torch.rand(64, 512 * 49), "0.bias": torch.rand(64)}
    linear |= {
        "3.weight": torch.rand(64, 64),
        "3.bias": torch.rand(64),
        "6.weight": torch.rand(1),
        "6.bias": torch.rand(1),
    }
    classifier = {f"classifier.{name}": value for name, value in linear.items()}
    save_file({**reference.state_dict(), **classifier}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({}))
    for arch in ("fcn8s", "segnet", "unet"):
        config = ModelConfig(arch=arch, encoder_name="vgg16", encoder_weights="imagenet")
        loaded = build_model(config, NUM_CLASSES).network.get_submodule("encoder").state_dict()
        for name, expected in reference.features.state_dict().items():
            assert torch.equal(loaded[f"features.{name}"], expected)
    fcn8s = build_model(config.model_copy(update={"arch": "fcn8s"}), NUM_CLASSES).network
    for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
        assert torch.equal(fcn8s.get_parameter(f"classifier.{name}").flatten(), linear[name].flatten())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(arch="unett"), r"model\.arch: unknown architecture 'unett'; choose from .*unet"),
        (
            ModelConfig(encoder_name="resnet19"),
            r"model\.encoder_name: unknown encoder 'resnet19'; did you mean",
        ),
        (ModelConfig(encoder_name="tu-nothing"), r"timm has no model 'nothing'"),
        (ModelConfig(arch="fcn8s", encoder_name="resnet18"), r"fcn8s needs a VGG encoder, got 'resnet18'"),
        (ModelConfig(arch="segnet", encoder_name="resnet18"), r"segnet needs a VGG encoder, got .*vgg16_bn"),
        (
            ModelConfig(arch="classic_unet", encoder_weights="imagenet"),
            r"model: classic_unet trains its own encoder; set encoder_weights: null .*or arch: unet",
        ),
        (
            ModelConfig(arch="classic_unet", freeze_encoder=True),
            r"model: classic_unet trains its own encoder; .*freeze_encoder: false",
        ),
    ],
)
def test_an_unknown_name_raises_with_the_accepted_values(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(config, NUM_CLASSES, SIZE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(encoder_name="tu-test_resnt"), "timm has no model 'test_resnt'; did you mean .*tu-test_resnet"),
        (
            ModelConfig(encoder_name="tu-test_resnet.a"),
            "timm has no weights 'a' for test_resnet; it has tu-test_resnet.r",
        ),
        (
            ModelConfig(encoder_name="tu-test_resnet", encoder_weights="coco"),
            r"model\.encoder_weights: tu-test_resnet has no weights 'coco'; choose imagenet for r160_in1k, or null",
        ),
        (
            ModelConfig(encoder_name="tu-halonet_h1", encoder_weights="imagenet"),
            r"model\.encoder_weights: timm has no pretrained weights for halonet_h1; set null",
        ),
        (
            ModelConfig(freeze_encoder=True),
            r"model\.freeze_encoder: true needs pretrained weights, .*; set encoder_weights, .*freeze_encoder: false",
        ),
        (
            ModelConfig(encoder_name="tu-vit_tiny_patch16_224"),
            r"^model: unet cannot be built on tu-vit_tiny_patch16_224 .*Unsupported model downsampling pattern",
        ),
    ],
)
def test_an_encoder_that_cannot_be_used_is_one_line(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(config, NUM_CLASSES, SIZE)


@pytest.mark.parametrize("encoder_weights", ["imagenet", "r160_in1k"])
def test_the_weights_of_a_timm_encoder_can_be_frozen(encoder_weights: str) -> None:
    config = ModelConfig(encoder_name="tu-test_resnet", encoder_weights=encoder_weights, freeze_encoder=True)
    assert check_model(config, NUM_CLASSES, SIZE).input_size.stride == 32


@pytest.mark.parametrize(
    ("arch", "encoder_name"),
    [("segformer", "mit_b0"), ("unet", "mit_b1"), ("dpt", "tu-test_vit"), ("segnet", "vgg11"), ("fcn8s", "vgg11")],
)
def test_a_check_takes_no_memory(arch: str, encoder_name: str) -> None:
    """SegFormer's encoders read the values of ``torch.linspace`` while they are built, which meta tensors lack."""
    model = check_model(ModelConfig(arch=arch, encoder_name=encoder_name), NUM_CLASSES, SIZE)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_network_that_does_not_support_the_image_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^image_size: the network of model does not support images of 64x64: .*"):
        check_model(ModelConfig(arch="pan"), NUM_CLASSES, (64, 64))


def test_an_unsupported_combination_raises() -> None:
    with pytest.raises(ConfigError, match="deeplabv3 cannot be built on vgg11"):
        check_model(ModelConfig(arch="deeplabv3", encoder_name="vgg11"), NUM_CLASSES, SIZE)
    with pytest.raises(ConfigError, match="dpt cannot be built on resnet18"):
        check_model(ModelConfig(arch="dpt", encoder_name="resnet18"), NUM_CLASSES, SIZE)
    with pytest.raises(ConfigError, match="has no weights 'imagnet'; choose from imagenet"):
        check_model(ModelConfig(encoder_weights="imagnet"), NUM_CLASSES, SIZE)


def test_an_encoder_of_one_size_accepts_smaller_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network for one size accepts smaller images, so that the size that DDP is prepared with is accepted too."""
    fit = EncoderFit(InputSize(fixed=(160, 192)))
    monkeypatch.setattr(build, "_find_fit", lambda *_: fit)
    model = build_model(ModelConfig(encoder_name="tu-test_resnet"), NUM_CLASSES, (150, 180)).eval()
    freeze_unused_parameters(model)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 150, 180)).shape == (1, NUM_CLASSES, 150, 180)
        with pytest.raises(ValueError, match="at most image_size"):
            model(torch.randn(1, 3, 170, 180))


@pytest.mark.usefixtures("make_hub_snapshot")
def test_weights_that_cannot_be_downloaded_raise() -> None:
    config = ModelConfig(encoder_weights="imagenet")
    check_model(config, NUM_CLASSES, SIZE)
    with pytest.raises(ConfigError, match=r"model\.encoder_weights: cannot load 'imagenet' .*or set null"):
        build_model(config, NUM_CLASSES)
    with pytest.raises(ConfigError, match=r"model\.encoder_weights: cannot look up what 'imagenet'"):
        Preprocessing.of_encoder(config)
