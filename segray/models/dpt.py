"""DPT on vision transformers whose patches are not 8, 16 or 32 pixels wide, such as DINOv2's of 14.

Source: Ranftl, Bochkovskiy and Koltun, "Vision Transformers for Dense Prediction", ICCV 2021; DPT on DINOv2 as in Oquab
et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024.

The decoder of segmentation-models-pytorch halves and doubles features, so its levels fit together only if the patch is
a power of two.
"""

import torch
from torch import nn
from torch.nn import functional

_GRID_STRIDE = 16


class RescaledEncoder(nn.Module):
    """An encoder that receives images scaled by patch / 16, so that its features have a stride of 16 image pixels."""

    def __init__(self, vit: nn.Module, patch_px: int) -> None:
        super().__init__()
        self.vit = vit
        self.patch_px = patch_px
        self.output_stride = _GRID_STRIDE  # The network checks that images are multiples of it.

    def forward(self, image_nchw: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Map images (N, 3, H, W) to features (N, D, H / 16, W / 16) of four blocks, and their class tokens."""
        height, width = (side // _GRID_STRIDE * self.patch_px for side in image_nchw.shape[-2:])
        scaled = functional.interpolate(image_nchw, (height, width), mode="bilinear", align_corners=False)
        found: tuple[list[torch.Tensor], list[torch.Tensor | None]] = self.vit(scaled)
        return found


def rescale_odd_patches(network: nn.Module) -> None:
    """Make smp's DPT work on any patch size, in place; one whose patch is a power of two is left unchanged."""
    from segmentation_models_pytorch import DPT
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder

    assert isinstance(network, DPT)
    encoder = network.encoder
    patch_px = encoder.output_stride
    if patch_px & (patch_px - 1) == 0:
        return
    network.decoder = DPTDecoder(
        encoder_out_channels=encoder.out_channels,
        encoder_output_strides=[_GRID_STRIDE] * len(encoder.out_channels),
        encoder_has_prefix_tokens=encoder.has_prefix_tokens,
    )
    network.encoder = RescaledEncoder(encoder, patch_px)
    network.initialize()
