"""DPT on patches of 14 pixels."""

import torch
from segmentation_models_pytorch import DPT

from segray.models.dpt import RescaledEncoder, rescale_odd_patches


def build(patch_px: int) -> DPT:
    network = DPT("tu-test_vit", encoder_weights=None, classes=4, patch_size=patch_px, dynamic_img_size=True).eval()
    rescale_odd_patches(network)
    return network


def test_patches_of_14_pixels_become_features_at_stride_16() -> None:
    network = build(14)
    seen: list[torch.Tensor] = []
    network.encoder.vit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        features, _ = network.encoder(torch.full((1, 3, 64, 96), 0.5))
        logits = network(torch.randn(1, 3, 64, 96))
    assert seen[0].shape == (1, 3, 56, 84)
    torch.testing.assert_close(seen[0], torch.full((1, 3, 56, 84), 0.5))  # Scaled, not padded.
    assert {tuple(each.shape[-2:]) for each in features} == {(4, 6)}
    assert logits.shape == (1, 4, 64, 96)


def test_a_patch_that_is_a_power_of_two_is_left_unchanged() -> None:
    assert not isinstance(build(16).encoder, RescaledEncoder)
