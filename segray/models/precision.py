"""Which arithmetic a model computes in."""

from contextlib import AbstractContextManager

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return the context in which a model computes: bfloat16 where asked for and where the processor has it.

    Elsewhere it is float32: a CPU without bfloat16 instructions emulates them, several times slower.

    Args:
        device: Where the model is.
        precision: ``bf16`` or ``fp32``.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and has_bf16(device))


def has_bf16(device: torch.device) -> bool:
    """Say whether a processor computes in bfloat16 by itself."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
