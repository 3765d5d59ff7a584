"""Segment a folder with Ray Data as its guide shows it: read_images, map_batches over actors, write_parquet.

python benchmarks/rivals/ray_data.py BUNDLE IMAGES OUTPUT
"""

import sys
from typing import Any

import numpy as np
import ray
import torch
from model import BATCH_SIZE, Model
from PIL import Image


class Predictor:
    """An actor with the model."""

    def __init__(self, bundle: str) -> None:
        torch.set_num_threads(2)
        self.model = Model(bundle, "fp32")

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
    """Read, predict, write."""
    bundle, images, output = sys.argv[1:]
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    (
        ray.data.read_images(images, mode="RGB", include_paths=True)
        .map_batches(
            Predictor,
            fn_constructor_args=(bundle,),
            batch_size=BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(output)
    )


if __name__ == "__main__":
    main()
