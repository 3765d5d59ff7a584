"""FCN-32s, FCN-16s and FCN-8s on a VGG encoder.

Source: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.

The skips use VGG's *pooled* features: pool3 (256 channels, stride 8), pool4 (512, stride 16), pool5 (512, stride 32).
The VGG encoder of segmentation-models-pytorch returns the features before each pool, so its layers are run here.

As in the paper, fc6 and fc7 begin with the weights of VGG's fully connected layers if the encoder is pretrained.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

FCN_STRIDES = {"fcn32s": 32, "fcn16s": 16, "fcn8s": 8}
_POOL3_CHANNELS, _POOL4_CHANNELS, _POOL5_CHANNELS = 256, 512, 512
_CLASSIFIER_CHANNELS = 4096


class FCN(nn.Module):
    """A fully convolutional network with skips down to the stride in its name: 32, 16 or 8.

    Attributes:
        pretrained_layers: Layers outside the encoder that begin with pretrained weights: fc6 and fc7.
    """

    pretrained_layers = ("classifier.0", "classifier.3")

    def __init__(self, arch: str, encoder_name: str, encoder_weights: str | None, num_classes: int) -> None:
        from segmentation_models_pytorch.encoders import get_encoder  # It takes seconds to import.

        super().__init__()
        self.stride = FCN_STRIDES[arch]
        self.encoder = get_encoder(encoder_name, weights=encoder_weights)
        self.classifier = nn.Sequential(  # These are VGG's fully connected layers as convolutions: fc6, fc7, score.
            nn.Conv2d(_POOL5_CHANNELS, _CLASSIFIER_CHANNELS, 7, padding=3),
            nn.ReLU(inplace=True),
            nn.Dropout2d(),
            nn.Conv2d(_CLASSIFIER_CHANNELS, _CLASSIFIER_CHANNELS, 1),
            nn.ReLU(inplace=True),
            nn.Dropout2d(),
            nn.Conv2d(_CLASSIFIER_CHANNELS, num_classes, 1),
        )
        if encoder_weights is not None:
            load_fully_connected(self.classifier, _read_weights(encoder_name, encoder_weights))
        if self.stride <= 16:
            self.score_pool4 = nn.Conv2d(_POOL4_CHANNELS, num_classes, 1)
            self.upscore_pool5 = build_bilinear_upsampling(num_classes, 2)
        if self.stride <= 8:
            self.score_pool3 = nn.Conv2d(_POOL3_CHANNELS, num_classes, 1)
            self.upscore_pool4 = build_bilinear_upsampling(num_classes, 2)
        self.upscore = build_bilinear_upsampling(num_classes, self.stride)

    def compute_taps(self, image_nchw: torch.Tensor) -> list[torch.Tensor]:
        """Return the features after each of VGG's five pools, at strides 2 to 32."""
        taps, features = [], image_nchw
        for layer in self.encoder.features:
            features = layer(features)
            if isinstance(layer, nn.MaxPool2d):
                taps.append(features)
        return taps

    def forward(self, image_nchw: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W), whose sides are multiples of 32, to logits (N, C, H, W)."""
        _, _, pool3, pool4, pool5 = self.compute_taps(image_nchw)
        score = self.classifier(pool5)
        if self.stride <= 16:
            score = self.upscore_pool5(score) + self.score_pool4(pool4)
        if self.stride <= 8:
            score = self.upscore_pool4(score) + self.score_pool3(pool3)
        logits_nchw: torch.Tensor = self.upscore(score)
        return logits_nchw


def load_fully_connected(classifier: nn.Sequential, weights: Mapping[str, torch.Tensor]) -> None:
    """Load the weights of VGG's first two fully connected layers into fc6 and fc7, in place.

    A fully connected layer on features (C, 7, 7) is a convolution with a kernel of 7x7, and one on 4096 numbers a
    convolution with a kernel of 1x1; the weights are the same numbers in the same order.

    Args:
        classifier: Convolutions of which those at 0 and 3 are fc6 and fc7.
        weights: A VGG's state dict. Without ``classifier.0`` and ``classifier.3``, both layers stay random, with a
            Python warning.
    """
    names = [f"classifier.{layer}.{kind}" for layer in (0, 3) for kind in ("weight", "bias")]
    if missing := [name for name in names if name not in weights]:
        warnings.warn(f"the pretrained VGG has no {missing[0]}; fc6 and fc7 start random", stacklevel=2)
        return
    with torch.no_grad():
        for name in names:
            parameter = classifier.get_parameter(name.removeprefix("classifier."))
            parameter.copy_(weights[name].reshape(parameter.shape))


def _read_weights(encoder_name: str, encoder_weights: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a pretrained VGG, from the file that ``get_encoder`` has just downloaded.

    The encoder of segmentation-models-pytorch drops the fully connected layers.
    """
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file
    from segmentation_models_pytorch.encoders import encoders

    source: dict[str, Any] = encoders[encoder_name]["pretrained_settings"][encoder_weights]
    path = hf_hub_download(source["repo_id"], filename="model.safetensors", revision=source["revision"])
    return dict(load_file(path))


def build_bilinear_upsampling(num_channels: int, factor: int) -> nn.ConvTranspose2d:
    """Build a learnable upsampling layer, initialised to bilinear interpolation (section 3.3 of the paper)."""
    size = 2 * factor
    layer = nn.ConvTranspose2d(num_channels, num_channels, size, stride=factor, padding=factor // 2, bias=False)
    ramp = 1 - (torch.arange(size) - (size - 1) / 2).abs() / factor
    with torch.no_grad():
        layer.weight.zero_()
        for channel in range(num_channels):
            layer.weight[channel, channel] = ramp[:, None] * ramp[None, :]
    return layer
