"""Gradient checkpointing: an encoder's blocks are computed again in the backward pass instead of being remembered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from segray.errors import ConfigError
from segray.models.build import SegmentationModel


def recompute_encoder(model: SegmentationModel) -> None:
    """Let each block of the encoder be computed twice and remembered not at all.

    Raises:
        ConfigError: The encoder is no sequence of blocks.
    """
    blocks = list(find_blocks(model.encoder))
    if not blocks:
        raise ConfigError(
            "train.gradient_checkpointing: this encoder has no blocks to compute again; set false, or choose an "
            "encoder with blocks, such as resnet18"
        )
    for block in blocks:
        block.forward = partial(_compute_again, block.forward, block)


def find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that stand in a sequence and consist of several others, such as residual blocks."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(list(child.children())) > 1:
            yield child
        else:
            yield from find_blocks(child)


def _compute_again(forward: Callable[..., Any], block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _without_statistics(block))
    )


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Keep BatchNorm from counting a batch again that it has counted."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
