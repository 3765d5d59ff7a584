"""Segment a folder with Ray Data as its guide shows it: read_images, map_batches over actors, write_parquet.

python benchmarks/rivals/ray_data.py BUNDLE IMAGES OUTPUT --precision fp32|bf16 --num-actors 1

The machine's cores are divided among the actors.
"""

import argparse
import os
from typing import Any

import numpy as np
import ray
import torch
from model import BATCH_SIZE, Model
from PIL import Image


class Predictor:
    """An actor with the model."""

    def __init__(self, bundle: str, precision: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.model = Model(bundle, precision)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Map images to rows."""
        decoded, sizes = [], []
        for image in batch["image"]:
            resized = Image.fromarray(image).resize(self.model.size[::-1], Image.Resampling.BILINEAR)
            decoded.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1).float())
            sizes.append(image.shape[:2])
        images = (torch.stack(decoded) - self.model._mean) / self.model._std
        masks = self.model.predict(images, sizes)
        rows = [self.model.describe(uri, mask) for uri, mask in zip(batch["path"], masks, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}


def main() -> None:
    """Read images, predict masks and write Parquet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("images")
    parser.add_argument("output")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--num-actors", type=int, default=1)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    num_threads = max(1, (os.cpu_count() or 1) // arguments.num_actors)
    (
        ray.data.read_images(arguments.images, mode="RGB", include_paths=True)
        .map_batches(
            Predictor,
            fn_constructor_args=(arguments.bundle, arguments.precision, num_threads),
            batch_size=BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=arguments.num_actors),
        )
        .write_parquet(arguments.output)
    )


if __name__ == "__main__":
    main()
