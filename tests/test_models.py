"""One contract for every architecture, and FCN's taps against torchvision's VGG16."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16

from segray.config import ModelConfig
from segray.errors import ConfigError
from segray.models.build import ARCHITECTURES, build_model, check_model, freeze_unused_parameters
from segray.models.fcn import FCN, build_bilinear_upsampling
from segray.transforms import Preprocessing

NUM_CLASSES = 4
ENCODERS = {"fcn32s": "vgg11", "fcn16s": "vgg11_bn", "fcn8s": "vgg11", "dpt": "tu-vit_tiny_patch16_224"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_maps_any_size_to_logits_of_that_size_and_learns(arch: str) -> None:
    config = ModelConfig(arch=arch, encoder_name=ENCODERS.get(arch, "resnet18"))
    torch.manual_seed(0)
    model = build_model(config, NUM_CLASSES).train()
    freeze_unused_parameters(model)
    image = torch.randn(2, 3, 129, 161)
    logits = model(image)
    assert logits.shape == (2, NUM_CLASSES, 129, 161)
    logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DistributedDataParallel waits for ever for a gradient that never comes
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(image)).all()
        torch.testing.assert_close(model(image[:1]), model(image)[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("encoder_name", ["vgg16", "vgg16_bn", "mobilenet_v2", "efficientnet-b0"])
def test_a_unet_takes_other_encoders(encoder_name: str) -> None:
    model = build_model(ModelConfig(encoder_name=encoder_name), NUM_CLASSES).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 33)).shape == (1, NUM_CLASSES, 40, 33)


def test_another_size_is_padded_with_its_own_edge() -> None:
    model = build_model(ModelConfig(), NUM_CLASSES).eval()
    image = torch.randn(1, 3, 40, 33)
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, 24), (0, 31)), mode="edge"))
    with torch.no_grad():
        assert torch.equal(model(image), model.network(padded)[..., :40, :33])


def test_padding_does_not_touch_a_size_that_fits() -> None:
    model = build_model(ModelConfig(), NUM_CLASSES).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(image), model.network(image))


def test_fcn_taps_are_torchvisions_pooled_features() -> None:
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


@pytest.mark.parametrize(("arch", "num_skips"), [("fcn32s", 0), ("fcn16s", 1), ("fcn8s", 2)])
def test_fcn_has_the_skips_of_its_name(arch: str, num_skips: int) -> None:
    model = build_model(ModelConfig(arch=arch, encoder_name="vgg11"), NUM_CLASSES)
    skips = [name for name, _ in model.network.named_children() if name.startswith("score_pool")]
    assert len(skips) == num_skips
    freeze_unused_parameters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())  # each skip reaches the logits


@pytest.mark.parametrize("factor", [2, 8])
def test_fcn_upsampling_starts_bilinear(factor: int) -> None:
    scores = torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        upsampled = build_bilinear_upsampling(3, factor)(scores)
    expected = nn.functional.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
    inside = slice(factor, -factor)
    torch.testing.assert_close(upsampled[..., inside, inside], expected[..., inside, inside])


def test_a_frozen_encoder_keeps_weights_and_batchnorm_statistics() -> None:
    model = build_model(ModelConfig(freeze_encoder=True), NUM_CLASSES)
    before = {name: value.clone() for name, value in model.network.get_submodule("encoder").state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    after = model.network.get_submodule("encoder").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.network.get_submodule("decoder").training


def test_pretrained_weights_land_in_the_encoder(make_hub_snapshot: Callable[..., Path]) -> None:
    snapshot = make_hub_snapshot("vgg16", "imagenet")
    reference = vgg16(weights=None)
    save_file(reference.state_dict(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({}))
    for arch in ("fcn8s", "unet"):
        config = ModelConfig(arch=arch, encoder_name="vgg16", encoder_weights="imagenet")
        loaded = build_model(config, NUM_CLASSES).network.get_submodule("encoder").state_dict()
        for name, expected in reference.features.state_dict().items():
            assert torch.equal(loaded[f"features.{name}"], expected)


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
    ],
)
def test_an_unknown_name_says_what_can_be_had(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(config, NUM_CLASSES)


def test_what_an_architecture_cannot_take_is_named() -> None:
    with pytest.raises(ConfigError, match="deeplabv3 cannot be built on vgg11"):
        check_model(ModelConfig(arch="deeplabv3", encoder_name="vgg11"), NUM_CLASSES)
    with pytest.raises(ConfigError, match="has no weights 'imagnet'; choose from imagenet"):
        check_model(ModelConfig(encoder_weights="imagnet"), NUM_CLASSES)


@pytest.mark.usefixtures("make_hub_snapshot")
def test_weights_that_cannot_be_reached_are_named() -> None:
    config = ModelConfig(encoder_weights="imagenet")
    check_model(config, NUM_CLASSES)
    with pytest.raises(ConfigError, match=r"model\.encoder_weights: cannot load 'imagenet' .*or set null"):
        build_model(config, NUM_CLASSES)
    with pytest.raises(ConfigError, match=r"model\.encoder_weights: cannot learn what 'imagenet'"):
        Preprocessing.of_encoder(config)
