"""One training step and one evaluation pass: no Ray, no reading or writing, any device and number of ranks."""

from collections.abc import Iterable

import torch
from torch import distributed, nn

from segray.classes import ClassMap
from segray.errors import TrainingError
from segray.losses import compute_cross_entropy
from segray.models.build import PROBE_SIZE
from segray.models.precision import autocast
from segray.models.prediction import compute_confusion, compute_mask
from segray.train.feed import EvalBatch, TrainBatch
from segray.transforms import Preprocessing


class NonFiniteLossError(TrainingError):
    """The loss of a step is NaN or infinite on some rank; raised on every rank, before any weight has moved."""


def settle_gradient_buckets(replica: nn.Module, device: torch.device) -> None:
    """Let DistributedDataParallel order its gradient buckets before the first real step.

    It does so after its first backward pass. From then on the ranks' gradients are added in another order, which with
    three or more ranks changes last bits; done here, a resumed run adds in the order of the unbroken one.
    """
    if not isinstance(replica, nn.parallel.DistributedDataParallel):
        return
    replica.eval()  # BatchNorm statistics stay as they are
    for _ in range(2):  # the second forward pass puts the new order into force
        replica(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device)).sum().backward()
    replica.zero_grad(set_to_none=True)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    *,
    preprocessing: Preprocessing,
    ignore_index: int,
    device: torch.device,
    precision: str,
) -> float:
    """Move the weights by one step and return the loss: the mean over the scored pixels of the global batch.

    The mean is over the pixels of all ranks together, so that a pixel weighs the same wherever it was dealt to.

    Raises:
        NonFiniteLossError: On every rank, before the optimizer moves.
    """
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    image_nchw = preprocessing.apply(torch.from_numpy(batch.images).to(device, non_blocking=True))
    truth_nhw = torch.from_numpy(batch.truth).to(device, non_blocking=True).long()
    with autocast(device, precision):
        logits_nchw = model(image_nchw)
    loss = compute_cross_entropy(logits_nchw, truth_nhw, ignore_index)
    totals = torch.stack([loss.total.detach().double(), loss.num_scored_px.double()])
    if world_size > 1:
        distributed.all_reduce(totals)
    num_scored_px = max(totals[1].item(), 1.0)
    mean_loss = totals[0].item() / num_scored_px
    if not torch.isfinite(totals[0]):
        raise NonFiniteLossError(f"loss is {mean_loss}")
    optimizer.zero_grad(set_to_none=True)
    # DistributedDataParallel averages gradients over ranks; the factor makes that the sum over the global batch
    (loss.total * (world_size / num_scored_px)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return mean_loss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    *,
    classes: ClassMap,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str,
) -> torch.Tensor:
    """Return the confusion matrix (C, C) int64 of these batches, each mask scored at its image's own size."""
    model.eval()
    num_classes = classes.num_classes
    confusion = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)
    for batch in batches:
        image_nchw = preprocessing.apply(torch.from_numpy(batch.images).to(device, non_blocking=True))
        with autocast(device, precision):
            logits_nchw = model(image_nchw)
        for logits_chw, truth in zip(logits_nchw, batch.truths, strict=False):  # the rest of the batch is padding
            mask = compute_mask(logits_chw, (truth.shape[0], truth.shape[1]))
            confusion += compute_confusion(torch.from_numpy(truth).to(device), mask, num_classes, classes.ignore_index)
    return confusion
