"""The contract of all architectures, for the smallest member of every family of timm, and its table in the docs."""

import pytest
import torch

from segray.config import ModelConfig
from segray.models.build import build_model, freeze_unused_parameters
from tests.models.timm_families import NUM_CLASSES, SIZE, describe_fit, list_families, load_table

TABLE = load_table()
CASES = [(family, arch) for family, row in TABLE.items() for arch in row if arch != "encoder"]


def require_contract(arch: str, encoder: str, size: tuple[int, int]) -> None:
    """Check that images are mapped to logits of their size, and that each weight to train has a gradient."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch=arch, encoder_name=encoder), NUM_CLASSES, size).train()
    freeze_unused_parameters(model)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, NUM_CLASSES, *size)
    assert torch.isfinite(logits).all()
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_table_has_every_family_of_timm() -> None:
    assert list(TABLE) == list_families()  # Otherwise: make encoders


@pytest.mark.parametrize(("arch", "encoder"), [("unet", "tu-test_resnet"), ("dpt", "tu-test_vit")])
def test_a_small_encoder_accepts_any_size(arch: str, encoder: str) -> None:
    assert describe_fit(arch, encoder) == "any"
    require_contract(arch, encoder, (65, 97))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "arch"), CASES)
def test_the_smallest_member_of_a_family_works_as_the_table_says(family: str, arch: str) -> None:
    encoder = TABLE[family]["encoder"]
    assert describe_fit(arch, encoder) == TABLE[family][arch]
    if TABLE[family][arch] != "no":
        require_contract(arch, encoder, SIZE)
