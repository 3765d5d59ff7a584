"""Learning-rate factors by layer, compared with those of BEiT's formula and with timm's on its own model."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from segray.config import ModelConfig
from segray.errors import ConfigError
from segray.models import layer_decay
from segray.models.build import check_model
from segray.models.layer_decay import compute_layer_factors

DECAY = 0.5
SIZE = (64, 64)


def list_factors(arch: str, encoder_name: str) -> dict[str, float]:
    model = check_model(ModelConfig(arch=arch, encoder_name=encoder_name), 2, SIZE)
    factors = compute_layer_factors(model, DECAY)
    assert factors.keys() == {id(parameter) for parameter in model.encoder.parameters()}
    return {name: factors[id(parameter)] for name, parameter in model.encoder.named_parameters()}


def test_each_block_of_a_vision_transformer_is_a_layer() -> None:
    factors = list_factors("dpt", "tu-test_vit")
    num_blocks = 1 + max(int(name.split("blocks.")[1].split(".")[0]) for name in factors if "blocks." in name)
    for name, factor in factors.items():
        if ".head." in name:  # DPT does not use it.
            continue
        layer = 0
        if "blocks." in name:
            layer = 1 + int(name.split("blocks.")[1].split(".")[0])
        elif "norm" in name.partition("model.")[2].partition(".")[0]:
            layer = num_blocks
        assert factor == DECAY ** (num_blocks + 1 - layer), name


@pytest.mark.parametrize("encoder_name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_a_network_of_features_has_timms_factors(encoder_name: str) -> None:
    factors = list_factors("unet", f"tu-{encoder_name}")
    with torch.device("meta"):
        reference = timm.create_model(encoder_name)
    scale = {id(p): g["lr_scale"] for g in param_groups_layer_decay(reference, layer_decay=DECAY) for p in g["params"]}
    shapes = {name: parameter.shape for name, parameter in reference.named_parameters()}
    expected = {name: scale[id(parameter)] for name, parameter in reference.named_parameters()}
    names = [name.replace("_", ".") for name in shapes]
    assert len(set(names)) == len(names)
    by_name = dict(zip(names, expected.values(), strict=True))
    got = {name.removeprefix("model.").replace("_", "."): factor for name, factor in factors.items()}
    common = got.keys() & by_name.keys()
    assert len(common) == len(got)
    assert {name: got[name] for name in common} == {name: by_name[name] for name in common}
    assert len(set(got.values())) >= 4
    assert max(got.values()) < 1


@pytest.mark.parametrize("encoder_name", ["resnet18", "mit_b0", "mobilenet_v2"])
def test_other_encoders_have_their_stages(encoder_name: str) -> None:
    factors = list_factors("segformer", encoder_name)
    assert set(factors.values()) == {DECAY, DECAY**2, DECAY**3}
    first, last = next(iter(factors.values())), list(factors.values())[-1]
    assert (first, last) == (DECAY**3, DECAY)
    if encoder_name == "resnet18":
        assert {factors[f"layer{number}.0.conv1.weight"] for number in (1, 2)} == {DECAY**3}
        assert factors["layer3.0.conv1.weight"] == DECAY**2


@pytest.mark.parametrize(("arch", "encoder_name"), [("unet", "vgg11"), ("classic_unet", "resnet18")])
def test_an_encoder_without_stages_is_refused(arch: str, encoder_name: str) -> None:
    model = check_model(ModelConfig(arch=arch, encoder_name=encoder_name), 2, SIZE)
    with pytest.raises(ConfigError, match=r"^train\.layer_decay: this encoder has no stages; .*encoder_lr_factor"):
        compute_layer_factors(model, DECAY)


def test_a_factor_of_one_changes_nothing() -> None:
    model = check_model(ModelConfig(arch="unet", encoder_name="tu-test_resnet"), 2, SIZE)
    assert set(compute_layer_factors(model, 1.0).values()) == {1.0}


@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_a_timm_encoder_whose_layers_are_not_known_is_refused(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = check_model(ModelConfig(arch="unet", encoder_name="tu-test_resnet"), 2, SIZE)
    factors = layer_decay._list_timm_factors("test_resnet", DECAY)
    known = dict(list(factors.items())[: int(share * len(factors))])
    if share == 1:  # All parameters are in one layer.
        known = dict.fromkeys(known, 1.0)
    monkeypatch.setattr(layer_decay, "_list_timm_factors", lambda *_: known)
    with pytest.raises(ConfigError, match=r"^train\.layer_decay: timm does not say which layers this encoder has; "):
        compute_layer_factors(model, DECAY)
