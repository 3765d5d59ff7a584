"""A network with its normalisation inside: the module that ``segray export`` writes to a file."""

import torch
from torch import nn

from segray.models.build import SegmentationModel
from segray.transforms import Preprocessing, normalize


class DeployableModel(nn.Module):
    """Pixels to logits in one module, in evaluation mode and without gradients.

    Mean and standard deviation are buffers, so that they move with the weights to whatever device these go to.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: SegmentationModel, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean))
        self.register_buffer("std", torch.tensor(preprocessing.std))
        self.requires_grad_(False).eval()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map RGB images (N, H, W, 3) uint8 to logits (N, C, H, W) float32."""
        logits_nchw: torch.Tensor = self.model(normalize(image, self.mean, self.std))
        return logits_nchw
