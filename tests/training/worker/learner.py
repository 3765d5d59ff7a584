"""Builders of the objects that a training step needs, for tests on the CPU."""

import numpy as np
import torch
from torch import nn

from segray.config import LossSettings
from segray.data.preprocessing import Preprocessing
from segray.models.losses import SegmentationLoss
from segray.training.worker.feed import TrainBatch
from segray.training.worker.steps import Learner

IGNORE, NUM_CLASSES = 255, 3
CPU = torch.device("cpu")


def make_learner(
    replica: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    loss: dict[str, object] | None = None,
    max_gradient_norm: float | None = None,
    precision: str = "fp32",
    device: torch.device = CPU,
) -> Learner:
    return Learner(
        replica=replica,
        loss=SegmentationLoss(LossSettings.model_validate(loss or {}), IGNORE, None, device),
        optimizer=optimizer or torch.optim.SGD(replica.parameters(), 0.05, momentum=0.9, fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        preprocessing=Preprocessing(),
        device=device,
        precision=precision,
        max_gradient_norm=max_gradient_norm,
    )


def make_batch(seed: list[int], size: int = 4, side: int = 16, ignored: float = 0.2) -> TrainBatch:
    """Return random images and ground truth; the number of ignored pixels differs widely between images."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, NUM_CLASSES, (size, side, side)).astype(np.uint8)
    for number in range(size):
        truth[number][rng.random((side, side)) < ignored * number] = IGNORE
    images = torch.from_numpy(rng.integers(0, 256, (size, side, side, 3), np.uint8))
    return TrainBatch(images, torch.from_numpy(truth), [str(n) for n in range(size)])


def select(batch: TrainBatch, share: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> TrainBatch:
    """Return the part of a batch with the given indices."""
    return TrainBatch(batch.images[share], batch.truth[share], [batch.image_uris[number] for number in share])


def split(batch: TrainBatch, num_parts: int) -> list[TrainBatch]:
    return [select(batch, part) for part in np.array_split(np.arange(len(batch.images)), num_parts)]


def build_network() -> nn.Module:
    """Build a network without BatchNorm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 13, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(13, NUM_CLASSES, 1))
