"""The original U-Net, as in the paper and most tutorials: double convolutions, without a pretrained encoder.

Source: Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015.
As in most implementations since, convolutions are padded, so that logits have the size of the image, and followed by
BatchNorm.
"""

from collections.abc import Sequence

import torch
from torch import nn


class ClassicUNet(nn.Module):
    """A U-Net with ``widths[i]`` channels at stride ``2**i``."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            build_double_convolution(before, width) for before, width in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # Each pair is a level and the one above it.
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, width, 2, stride=2) for below, width in steps)
        self.decoder = nn.ModuleList(build_double_convolution(2 * width, width) for _, width in steps)
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, image_nchw: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W), whose sides are multiples of the largest stride, to logits (N, C, H, W)."""
        skips: list[torch.Tensor] = []
        features = image_nchw
        for level in self.encoder:
            features = level(self.pool(features) if skips else features)
            skips.append(features)
        for up, merge, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            features = merge(torch.cat([skip, up(features)], 1))
        logits_nchw: torch.Tensor = self.head(features)
        return logits_nchw


def build_double_convolution(num_in: int, num_out: int) -> nn.Sequential:
    """Build two 3x3 convolutions, each followed by BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (num_in, num_out):
        layers += [
            nn.Conv2d(channels, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
