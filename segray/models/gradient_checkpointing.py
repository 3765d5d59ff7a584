"""Gradient checkpointing: an encoder's blocks are computed again in the backward pass instead of being remembered."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
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


def _compute_again(forward: Callable[..., Any], block: nn.Module, *inputs: Any, **options: Any) -> Any:
    if torch.compiler.is_compiling():  # which takes no contexts, and computes without changing statistics
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    def build_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _keep_statistics(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=build_contexts, **options)


@contextmanager
def _keep_statistics(block: nn.Module) -> Iterator[None]:
    """Put BatchNorm's statistics back, which have counted the batch already.

    They cannot just be left alone: a norm that does not track remembers other tensors, and checkpoint wants the same.
    """
    buffers = list(block.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
