"""Folding BatchNorm into convolutions gives the same logits with fewer modules."""

import pytest
import torch
from torch import nn

from segray.config import ModelConfig
from segray.models import fuse_batchnorm as folding
from segray.models.build import SegmentationModel, build_model
from segray.models.fuse_batchnorm import fold_norms

SIZE = (96, 160)


def build_with_random_norms(arch: str, encoder_name: str) -> SegmentationModel:
    """Build a model with random BatchNorm statistics and weights."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch=arch, encoder_name=encoder_name, widths=(8, 16, 32)), 5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "encoder_name"), [("unet", "resnet18"), ("classic_unet", ""), ("fpn", "vgg11_bn"), ("segformer", "mit_b0")]
)
@torch.inference_mode()
def test_folding_does_not_change_the_logits(arch: str, encoder_name: str) -> None:
    model = build_with_random_norms(arch, encoder_name or "resnet18")
    image = torch.randn(2, 3, *SIZE)
    expected = model(image)
    torch.testing.assert_close(fold_norms(model, SIZE)(image), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_all_norms_of_a_unet_are_folded_and_any_image_size_works() -> None:
    model = build_with_random_norms("unet", "resnet18")
    assert count_norms(model) > 20
    folded = fold_norms(model, SIZE)
    assert count_norms(folded) == 0
    assert folded(torch.zeros(1, 3, 50, 70)).shape == (1, 5, 50, 70)


def test_a_network_whose_logits_would_change_is_left_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_with_random_norms("unet", "resnet18")
    network = model.network
    monkeypatch.setattr(folding, "fuse", lambda own: build_with_random_norms("unet", "resnet34").network)
    assert fold_norms(model, SIZE).network is network
