"""Numeric precision of a model's computations."""

from contextlib import AbstractContextManager

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context in which models on ``device`` compute in ``precision``: ``bf16``, ``fp16`` or ``fp32``."""
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)


def get_dtype(precision: str) -> torch.dtype | None:
    """Return the data type of the arithmetic in ``bf16`` or ``fp16``; None for ``fp32``."""
    return _DTYPES.get(precision)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device supports bfloat16 natively; emulation is several times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.mkldnn.is_available() and bool(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
