"""Set up torch for a rank's device: threads, determinism, and the precision that every rank supports."""

import os

import torch
from torch import distributed

from segray.models.precision import has_bf16
from segray.runtime.connect import count_cores
from segray.training.progress_board import ProgressPoster


def count_cores_per_rank(num_local_ranks: int) -> int:
    """Return a rank's share of the cores of its node."""
    return max(1, count_cores() // num_local_ranks)


def configure_torch(deterministic: bool, device: torch.device, num_local_ranks: int) -> None:
    """Set the number of CPU threads, or the arithmetic and determinism of GPU kernels, for this process."""
    if device.type == "cpu":  # The workers of a node share its cores.
        torch.set_num_threads(count_cores_per_rank(num_local_ranks))
        return
    torch.set_float32_matmul_precision("high")  # TF32, as convolutions have by default.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # Read at the first matrix multiplication.
        torch.use_deterministic_algorithms(True, warn_only=True)


def resolve_precision(precision: str, device: torch.device, poster: ProgressPoster | None) -> str:
    """Return the precision to train in, the same on all ranks: fp32 instead of bf16 if a rank lacks native bf16."""
    if precision != "bf16":
        return precision
    supported = torch.tensor(int(has_bf16(device)), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(supported, distributed.ReduceOp.MIN)
    if not supported.item() and poster:
        poster.post_line("bf16 is not supported natively on every worker; training in fp32")
    return "bf16" if supported.item() else "fp32"
