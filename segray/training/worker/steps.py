"""One training step: no Ray, no reading or writing, any device and number of ranks."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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


class NonFiniteLossError(TrainingError):
    """The loss of a step, or its gradient, is not finite on some rank; raised on all, before any weight has moved."""


@dataclass(frozen=True)
class Learner:
    """What a training step works with.

    Attributes:
        replica: The model, wrapped where there are several ranks.
        loss: What is minimised.
        optimizer: What moves the weights.
        scaler: Scales fp16 gradients; does nothing in other precisions.
        preprocessing: From pixels to the model's input.
        device: Where the model is.
        precision: What it computes in.
        max_gradient_norm: Longer gradients are shortened to it.
    """

    replica: nn.Module
    loss: SegmentationLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    preprocessing: Preprocessing
    device: torch.device
    precision: str
    max_gradient_norm: float | None = None


def settle_gradient_buckets(replica: nn.Module, device: torch.device) -> None:
    """Let DistributedDataParallel order its gradient buckets before the first real step.

    It does so after its first backward pass. From then on the ranks' gradients are added in another order, which with
    three or more ranks changes last bits; done here, a resumed run adds in the order of the unbroken one.
    """
    if not isinstance(replica, DistributedDataParallel):
        return
    replica.eval()  # BatchNorm statistics stay as they are
    for _ in range(2):  # the second forward pass puts the new order into force
        replica(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device)).sum().backward()
    replica.zero_grad(set_to_none=True)


def train_step(learner: Learner, parts: Sequence[TrainBatch], announce: Callable[[str], None]) -> float:
    """Move the weights by one step and return the loss of the global batch.

    Sums are divided by counts of all ranks and parts together, so that a pixel, or an image, weighs the same wherever
    it was dealt to.

    Args:
        learner: The model and what moves it.
        parts: This rank's share of the global batch, computed one after the other; as many on every rank.
        announce: Told each stage that is entered, for those who watch over stalls.

    Raises:
        NonFiniteLossError: On every rank, before the optimizer moves.
    """
    truths = [torch.from_numpy(part.truth).to(learner.device, non_blocking=True).long() for part in parts]
    counts = _sum_over_ranks(torch.stack([learner.loss.count(truth) for truth in truths]).sum(0))
    # data parallelism averages gradients over ranks; the factor makes that the sum over the global batch
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    learner.optimizer.zero_grad(set_to_none=True)
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
    announce("update")
    loss = learner.loss.combine(_sum_over_ranks(sums), counts).item()
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"loss is {loss}")
    _limit_gradients(learner)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    return loss


def _limit_gradients(learner: Learner) -> None:
    """Shorten gradients that are too long, and refuse those without end, which a finite loss may have too."""
    parameters = [p for p in _list_parameters(learner.optimizer) if p.grad is not None]
    learner.scaler.unscale_(learner.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    length = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not learner.scaler.is_enabled() and not math.isfinite(length):  # the scaler skips such steps by itself
        raise NonFiniteLossError(f"the gradient's length is {length}")
    if learner.max_gradient_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, learner.max_gradient_norm, norm)


def _sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def _synchronised(replica: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Return the context of a part's forward and backward pass: ranks add up gradients in the last one only."""
    if isinstance(replica, FSDPModule):
        replica.set_requires_gradient_sync(is_last)
    elif isinstance(replica, DistributedDataParallel) and not is_last:
        return replica.no_sync()
    return nullcontext()


def _list_parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
