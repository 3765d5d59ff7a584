"""Run one training step on any device and any number of ranks; needs neither Ray nor storage."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segray.data.preprocessing import Preprocessing
from segray.errors import TrainingError
from segray.models.build import PROBE_SIZE
from segray.models.losses import SegmentationLoss
from segray.models.precision import autocast
from segray.training.worker.feed import TrainBatch

SKIPPED = math.nan  # What ``train_step`` returns instead of the loss of a step that changed nothing.


class NonFiniteLossError(TrainingError):
    """Raised on all ranks if the loss or gradient of a step is not finite on any rank; the weights are not updated."""


@dataclass(frozen=True)
class Learner:
    """The objects that a training step needs.

    Attributes:
        replica: The model, wrapped in DDP or sharded by FSDP if there are several ranks.
        loss: The loss to minimise.
        optimizer: The optimizer of the model's parameters.
        scaler: Scales fp16 gradients; disabled in other precisions.
        preprocessing: Converts (N, H, W, 3) uint8 pixels to the model's input.
        device: Device of the model.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        max_gradient_norm: Gradients with a larger norm are scaled down to it; None: no limit.
        diagnostics: ``gradient_norm`` of the last step, if it was clipped, before clipping and on the device.
    """

    replica: nn.Module
    loss: SegmentationLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    preprocessing: Preprocessing
    device: torch.device
    precision: str
    max_gradient_norm: float | None = None
    diagnostics: dict[str, torch.Tensor] = field(default_factory=dict)


def rebuild_gradient_buckets(replica: nn.Module, device: torch.device) -> None:
    """Make DistributedDataParallel rebuild its gradient buckets before the first real step.

    DDP rebuilds its buckets after the first backward pass and from then on sums the gradients of the ranks in another
    order, which changes the last bits with three or more ranks. Rebuilding them here makes a resumed run sum in the
    same order as an uninterrupted one.
    """
    if not isinstance(replica, DistributedDataParallel):
        return
    replica.eval()  # So that BatchNorm statistics are not updated.
    for _ in range(2):  # The second forward pass applies the new order.
        replica(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device)).sum().backward()
    replica.zero_grad(set_to_none=True)


def train_step(learner: Learner, parts: Sequence[TrainBatch], announce: Callable[[str], None]) -> float:
    """Update the weights by one step and return the loss of the global batch.

    Loss sums are divided by counts over all ranks and parts, so each pixel or image has the same weight regardless of
    the rank or part it is in.

    In fp16, numbers above 65,504 overflow. A step whose loss or gradient is not finite on any rank is then skipped on
    all of them: weights, optimizer and BatchNorm statistics stay as they were, and the scaler halves its factor.

    Args:
        learner: The model, loss and optimizer.
        parts: This rank's share of the global batch, processed one part after the other; the same number on every rank.
        announce: Called with the name of each stage as it begins, for stall detection.

    Returns:
        The loss, or ``SKIPPED`` (NaN).

    Raises:
        NonFiniteLossError: In fp32 and bf16, the loss or gradient is not finite; raised on every rank, before the
            weights are updated.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    learner.diagnostics.clear()
    buffers = list(learner.replica.buffers()) if learner.scaler.is_enabled() else []
    earlier = [buffer.clone() for buffer in buffers]
    loss = _accumulate_gradients(learner, parts, announce)
    announce("update")
    problem = None if math.isfinite(loss) else f"loss is {loss}"
    problem = problem or _clip_gradients(learner)
    if problem is None:
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        return loss
    if not learner.scaler.is_enabled():
        raise NonFiniteLossError(problem)
    for buffer, value in zip(buffers, earlier, strict=True):
        buffer.copy_(value)
    # Not by scaler.step: a loss can be infinite although no gradient is, and FSDP ranks look only at their own shards.
    learner.scaler.update(learner.scaler.get_scale() * learner.scaler.get_backoff_factor())
    return SKIPPED


def _accumulate_gradients(learner: Learner, parts: Sequence[TrainBatch], announce: Callable[[str], None]) -> float:
    """Run the forward and backward passes of a step, and return the loss of the global batch."""
    truths = [torch.from_numpy(part.truth).to(learner.device, non_blocking=True).long() for part in parts]
    counts = _sum_over_ranks(torch.stack([learner.loss.count(truth) for truth in truths]).sum(0))
    # DDP and FSDP average gradients over ranks; the factor world_size turns the average into the sum.
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    sums = torch.zeros_like(counts)
    for number, (part, truth) in enumerate(zip(parts, truths, strict=True)):
        image_nchw = learner.preprocessing.apply(torch.from_numpy(part.images).to(learner.device, non_blocking=True))
        with _synchronised(learner.replica, is_last=number == len(parts) - 1):
            announce("forward")
            with autocast(learner.device, learner.precision):
                logits_nchw = learner.replica(image_nchw)
            part_sums = learner.loss.sum(logits_nchw, truth)
            announce("backward")
            scaled = learner.scaler.scale(learner.loss.combine(part_sums, counts) * world_size)
            scaled.backward()  # type: ignore[no-untyped-call]
        sums += part_sums.detach()
    return learner.loss.combine(_sum_over_ranks(sums), counts).item()


def _clip_gradients(learner: Learner) -> str | None:
    """Clip the gradient norm; return what is wrong if it is not finite, which can happen even if the loss is finite."""
    parameters = [p for p in _list_parameters(learner.optimizer) if p.grad is not None]
    learner.scaler.unscale_(learner.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if learner.max_gradient_norm is not None:
        learner.diagnostics["gradient_norm"] = whole_norm
    norm_value = whole_norm.item()
    if not math.isfinite(norm_value):
        return f"the gradient norm is {norm_value}"
    if learner.max_gradient_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, learner.max_gradient_norm, norm)
    return None


def _sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def _synchronised(replica: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Return the context for the forward and backward pass of a part: gradients are reduced in the last part only."""
    if isinstance(replica, FSDPModule):
        replica.set_requires_gradient_sync(is_last)
    elif isinstance(replica, DistributedDataParallel) and not is_last:
        return replica.no_sync()
    return nullcontext()


def _list_parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
