"""Run one training step on any device and any number of ranks; needs neither Ray nor storage."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segray.data.preprocessing import Preprocessing
from segray.models.build import PROBE_SIZE
from segray.models.losses import SegmentationLoss
from segray.models.precision import autocast
from segray.training.worker.feed import TrainBatch


@dataclass(frozen=True)
class Learner:
    """The objects that a training step needs.

    Attributes:
        replica: The model, wrapped in DDP or sharded by FSDP if there are several ranks.
        loss: The loss to minimise.
        optimizer: The optimizer of the model's parameters. It must be fused: other optimizers of torch cannot skip a
            step unless the host waits for the device.
        scaler: Scales fp16 gradients; disabled in other precisions.
        preprocessing: Converts (N, H, W, 3) uint8 pixels to the model's input.
        device: Device of the model.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        max_gradient_norm: Gradients with a larger norm are scaled down to it; None: no limit.
    """

    replica: nn.Module
    loss: SegmentationLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    preprocessing: Preprocessing
    device: torch.device
    precision: str
    max_gradient_norm: float | None = None

    def __post_init__(self) -> None:
        assert self.optimizer.defaults["fused"]


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


def train_step(learner: Learner, parts: Sequence[TrainBatch], announce: Callable[[str], None]) -> torch.Tensor:
    """Update the weights by one step, without waiting for the device.

    Loss sums are divided by counts over all ranks and parts, so each pixel or image has the same weight regardless of
    the rank or part it is in.

    A step whose loss or gradient is not finite on any rank changes no weight and no state of the optimizer on any of
    them; the device decides this, so that the host can queue the next step in the meantime. In fp16, where numbers
    above 65,504 overflow, BatchNorm statistics stay as they were, too, and the scaler halves its factor.

    Args:
        learner: The model, loss and optimizer.
        parts: This rank's share of the global batch, processed one part after the other; the same number on every rank.
        announce: Called with the name of each stage as it begins, for stall detection.

    Returns:
        (2,) float64 on the learner's device, the same on every rank: the loss of the global batch, and the norm of the
        gradient before clipping. If either is not finite, the step was skipped.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    buffers = list(learner.replica.buffers()) if learner.scaler.is_enabled() else []
    earlier = [buffer.clone() for buffer in buffers]
    loss = _accumulate_gradients(learner, parts, announce)
    announce("update")
    learner.scaler.unscale_(learner.optimizer)
    norm = _clip_gradients(learner)
    result = torch.stack([loss, norm.to(loss.dtype)])
    is_skipped = ~result.isfinite().all()
    _update_weights(learner, is_skipped)
    for buffer, value in zip(buffers, earlier, strict=True):
        buffer.copy_(torch.where(is_skipped, value, buffer))
    return result


def _accumulate_gradients(
    learner: Learner, parts: Sequence[TrainBatch], announce: Callable[[str], None]
) -> torch.Tensor:
    """Run the forward and backward passes of a step, and return the loss of the global batch."""
    truths = [part.truth.to(learner.device, non_blocking=True).long() for part in parts]
    counts = _sum_over_ranks(torch.stack([learner.loss.count(truth) for truth in truths]).sum(0))
    # DDP and FSDP average gradients over ranks; the factor world_size turns the average into the sum.
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    sums = torch.zeros_like(counts)
    for number, (part, truth) in enumerate(zip(parts, truths, strict=True)):
        image_nchw = learner.preprocessing.apply(part.images.to(learner.device, non_blocking=True))
        with _synchronised(learner.replica, is_last=number == len(parts) - 1):
            announce("forward")
            with autocast(learner.device, learner.precision):
                logits_nchw = learner.replica(image_nchw)
            part_sums = learner.loss.sum(logits_nchw, truth)
            announce("backward")
            scaled = learner.scaler.scale(learner.loss.combine(part_sums, counts) * world_size)
            scaled.backward()  # type: ignore[no-untyped-call]
        sums += part_sums.detach()
    return learner.loss.combine(_sum_over_ranks(sums), counts)


def _clip_gradients(learner: Learner) -> torch.Tensor:
    """Clip the gradient norm, and return what it was before.

    The norm is computed even without clipping, to find gradients that are not finite although the loss is. It reads
    each gradient once; torch's own check, that of the gradient scaler, also writes each.
    """
    parameters = [p for p in _list_parameters(learner.optimizer) if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if learner.max_gradient_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, learner.max_gradient_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _update_weights(learner: Learner, is_skipped: torch.Tensor) -> None:
    """Update the weights and the scaler; where ``is_skipped`` (scalar bool) is true, only the scaler."""
    optimizer, scaler = learner.optimizer, learner.scaler
    found_inf = is_skipped.float()
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # Read by the step of fused optimizers.
    optimizer.step()
    if not scaler.is_enabled():
        return
    # The scaler has checked the gradients, but not the loss, and with FSDP only those of this rank.
    for flag in scaler._found_inf_per_device(optimizer).values():
        flag.copy_(found_inf)
    scaler.update()


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
