"""Train on CamVid with a plain script around segmentation-models-pytorch, as a reference for jobs/camvid.yaml.

resnet18 U-Net from scratch, 192x256, random crops and flips, AdamW, one-cycle schedule, bf16 if the processor has it.
One process without Ray.

    python benchmarks/camvid_plain_smp.py data/camvid --epochs 130
    python benchmarks/camvid_plain_smp.py data/camvid --held-out 0016E5 --minutes 10

With `--held-out`, it trains on the images of train and val whose names do not begin so, and evaluates on the others.
With `--minutes`, it trains as many epochs as the first 30 steps say will fit.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

NUM_CLASSES, VOID, IGNORED = 11, 11, 255
HEIGHT, WIDTH, BATCH_SIZE = 192, 256, 8
HAS_BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # Emulating it is several times slower.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255

Pair = tuple[torch.Tensor, torch.Tensor]


class CamVid(Dataset[Pair]):
    """Normalised images (3, H, W) float32 with ground truth (H, W) int64; pairs of ``train`` have 192x256 pixels."""

    def __init__(self, root: Path, split: str, held_out: str | None = None) -> None:
        self.is_train = split == "train"
        pairs = [(path, root / "masks" / path.parent.name / path.name) for path in sorted(root.glob("images/*/*"))]
        self.paths = [
            pair
            for pair in pairs
            if (
                pair[0].parent.name == split if held_out is None else pair[0].name.startswith(held_out) != self.is_train
            )
        ]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pair:
        image_path, mask_path = self.paths[index]
        image = torch.from_numpy(np.array(Image.open(image_path).convert("RGB"))).permute(2, 0, 1)
        truth = torch.from_numpy(np.array(Image.open(mask_path)))[None]
        if self.is_train:
            box = RandomResizedCrop.get_params(image, scale=[0.3, 1.0], ratio=[3 / 4, 4 / 3])
            nearest = transforms.InterpolationMode.NEAREST
            image = transforms.resized_crop(image, *box, [HEIGHT, WIDTH], antialias=True)
            truth = transforms.resized_crop(truth, *box, [HEIGHT, WIDTH], nearest)
            if torch.rand(()) < 0.5:
                image, truth = image.flip(-1), truth.flip(-1)
        else:
            image = transforms.resize(image, [HEIGHT, WIDTH], antialias=True)
        truth = truth[0].long()
        return (image.float() - MEAN) / STD, truth.where(truth != VOID, IGNORED)


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: "DataLoader[Pair]") -> torch.Tensor:
    """Return the confusion matrix over the split, with masks at the images' own size."""
    model.eval()
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)
    for image, truth in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BF16):
            logits = model(image)
        mask = functional.interpolate(logits.float(), size=truth.shape[1:], mode="bilinear").argmax(1)
        scored = truth != IGNORED
        pairs = truth[scored] * NUM_CLASSES + mask[scored]
        confusion += torch.bincount(pairs, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)
    return confusion


def main() -> None:
    """Train, and print the validation IoU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--epochs", type=int, default=130)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held-out")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    train = DataLoader(
        CamVid(arguments.root, "train", arguments.held_out),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=1,
        persistent_workers=True,
    )
    val = DataLoader(CamVid(arguments.root, "val", arguments.held_out), BATCH_SIZE)
    model = smp.Unet("resnet18", encoder_weights=None, classes=NUM_CLASSES).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)

    def step(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BF16):
            logits = model(image.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits.float(), truth, ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    num_epochs = arguments.epochs
    if arguments.minutes is not None:
        num_epochs = max(1, int(arguments.minutes * 60 / measure_epoch(train, step)))
    num_steps = num_epochs * len(train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps + 1)
    started_s = time.monotonic()
    for epoch in range(1, num_epochs + 1):
        model.train()
        for image, truth in train:
            loss = step(image, truth)
            schedule.step()
        if epoch % 10 == 0 or epoch == num_epochs:
            print(f"epoch {epoch}  loss {loss.item():.3f}  {time.monotonic() - started_s:.0f} s", flush=True)
    confusion = evaluate(model, val)
    iou = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
    print(f"val mean IoU {iou.mean():.4f} after {time.monotonic() - started_s:.0f} s:", [f"{v:.3f}" for v in iou])
    print(json.dumps({"confusion": confusion.tolist(), "num_epochs": num_epochs}))


def measure_epoch(train: "DataLoader[Pair]", step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """Return the seconds of an epoch, from 30 steps after the first 10; the model keeps what it learns in them."""
    marks = []
    for image, truth in train:
        step(image, truth)
        marks.append(time.monotonic())
        if len(marks) == 40:
            break
    timed = marks[10:] if len(marks) > 20 else marks
    return len(train) * (timed[-1] - timed[0]) / (len(timed) - 1)


if __name__ == "__main__":
    main()
