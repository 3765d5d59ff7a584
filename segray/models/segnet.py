"""SegNet: a VGG encoder, and a mirrored decoder that unpools with the pooling indices of the encoder.

Source: Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", TPAMI 2017. With the encoder vgg16_bn it is the network of the paper.

The VGG encoder of segmentation-models-pytorch does not return pooling indices, so its layers are run here.
"""

import torch
from torch import nn
from torch.nn import functional


class SegNet(nn.Module):
    """An encoder and a mirrored decoder that receives only the last features and the pooling indices."""

    def __init__(self, encoder_name: str, encoder_weights: str | None, num_classes: int) -> None:
        from segmentation_models_pytorch.encoders import get_encoder  # It takes seconds to import.

        super().__init__()
        self.encoder = get_encoder(encoder_name, weights=encoder_weights)
        widths: list[list[int]] = [[]]  # The input channels of the convolutions of each stage.
        for layer in self.encoder.features:
            if isinstance(layer, nn.MaxPool2d):
                widths.append([])
            elif isinstance(layer, nn.Conv2d):
                widths[-1].append(layer.in_channels)
        stages = [list(reversed(stage)) for stage in reversed(widths) if stage]
        stages[-1].pop()  # Drop the convolution to the image's 3 channels, which the head replaces.
        self.decoder = nn.ModuleList()
        num_channels = stages[0][0]
        for stage in stages:
            layers: list[nn.Module] = []
            for width in stage:
                layers += [
                    nn.Conv2d(num_channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                num_channels = width
            self.decoder.append(nn.Sequential(*layers))
        self.head = nn.Conv2d(num_channels, num_classes, 3, padding=1)

    def forward(self, image_nchw: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W), whose sides are multiples of 32, to logits (N, C, H, W)."""
        features, indices = image_nchw, []
        for layer in self.encoder.features:
            if isinstance(layer, nn.MaxPool2d):
                features, index = functional.max_pool2d(features, 2, return_indices=True)
                indices.append(index)
            else:
                features = layer(features)
        for stage, index in zip(self.decoder, reversed(indices), strict=True):
            features = stage(functional.max_unpool2d(features, index, [2, 2]))
        logits_nchw: torch.Tensor = self.head(features)
        return logits_nchw
