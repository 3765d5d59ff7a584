"""Gradient checkpointing: activations of the encoder's blocks are recomputed in the backward pass, not stored."""

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
    """Make each block of the encoder recompute its activations in the backward pass, in place, to save memory.

    Raises:
        ConfigError: The encoder does not consist of blocks.
    """
    blocks = list(find_blocks(model.encoder))
    if not blocks:
        raise ConfigError(
            "train.gradient_checkpointing: this encoder has no blocks to recompute; set false, or choose an "
            "encoder with blocks, such as resnet18"
        )
    for block in blocks:
        block.forward = partial(_recompute, block.forward, block)


def find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that are in a sequence and contain several modules, such as residual blocks."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(list(child.children())) > 1:
            yield child
        else:
            yield from find_blocks(child)


def _recompute(forward: Callable[..., Any], block: nn.Module, *inputs: Any, **options: Any) -> Any:
    if torch.compiler.is_compiling():  # The compiler accepts no context_fn, and does not update statistics twice.
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    def build_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _keep_statistics(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=build_contexts, **options)


@contextmanager
def _keep_statistics(block: nn.Module) -> Iterator[None]:
    """Restore BatchNorm statistics afterwards, since the first forward pass has already updated them for this batch.

    Turning tracking off instead does not work: BatchNorm would then save other tensors for the backward pass, and
    ``checkpoint`` requires the same ones.
    """
    buffers = list(block.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
