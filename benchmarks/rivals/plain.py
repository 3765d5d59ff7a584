"""Segment a folder with a plain script: DataLoader, smp, masks in Parquet.

python benchmarks/rivals/plain.py BUNDLE IMAGES OUTPUT --precision fp32|bf16
"""

import argparse
from pathlib import Path

import pyarrow as pa
import torch
from model import BATCH_SIZE, Model
from pyarrow import parquet as pq
from torch.utils.data import DataLoader, Dataset

_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask", pa.binary()),
        ("pixel_count", pa.list_(pa.int64())),
    ]
)
Item = tuple[str, torch.Tensor, tuple[int, int]]


class Images(Dataset[Item]):
    """Images of a folder at the model's size, with their paths and own sizes."""

    def __init__(self, paths: list[Path], model: Model) -> None:
        self.paths = paths
        self.model = model

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        return str(self.paths[index]), *self.model.read(str(self.paths[index]))


def main() -> None:
    """Read images, predict masks and write Parquet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--num-loaders", type=int, default=1)
    arguments = parser.parse_args()
    model = Model(arguments.bundle, arguments.precision)
    images = Images(sorted(arguments.images.iterdir()), model)
    batches = DataLoader(images, BATCH_SIZE, num_workers=arguments.num_loaders, collate_fn=list)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(arguments.output / "masks.parquet", _SCHEMA, compression="zstd") as writer:
        for batch in batches:
            uris, tensors, sizes = zip(*batch, strict=True)
            masks = model.predict(torch.stack(tensors), list(sizes))
            rows = [model.describe(uri, mask) for uri, mask in zip(uris, masks, strict=True)]
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))


if __name__ == "__main__":
    main()
