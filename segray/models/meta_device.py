"""Build and run networks on the meta device, where tensors have a shape but no values, so it costs almost nothing."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _LinspaceOnCpu(TorchFunctionMode):
    """Compute ``torch.linspace`` on the CPU, because networks read from it the rates of their stochastic depth."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Call a function that builds a network, with its parameters and buffers on the meta device; return the network.

    Every library that ``build`` imports must have been imported before, or its constants would be meta tensors.
    """
    try:
        with torch.device("meta"), _LinspaceOnCpu():
            return build()
    except RuntimeError:  # A constructor read the values of another tensor.
        return build().to("meta")


def run_on_meta(model: nn.Module, size: tuple[int, int], num_classes: int) -> None:
    """Run a network on the meta device on one image (1, 3, H, W); it is left in evaluation mode.

    Args:
        model: The network.
        size: Height and width in pixels.
        num_classes: The number of channels that the logits must have.

    Raises:
        ValueError: The logits do not have the shape (1, C, H, W).
        Exception: The network does not support the size.
    """
    with torch.no_grad():
        logits_nchw = model.eval()(torch.empty(1, 3, *size, device="meta"))
    if logits_nchw.shape != (1, num_classes, *size):
        raise ValueError(f"the logits have shape {tuple(logits_nchw.shape)}, expected {(1, num_classes, *size)}")
