"""The control experiment: a segmentation in five lines of Ray Data, which shows that the faults have an effect.

``python -m tests.faults.naive IMAGES OUTPUT [MAX_ERRORED_BLOCKS]`` prints the number of rows and of distinct images in
OUTPUT afterwards, as JSON.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
from ray.data import DataContext


def segment(batch: dict[str, Any]) -> dict[str, Any]:
    """Return pixel counts in place of a model's masks: only the rows matter here."""
    masks = [np.asarray(image)[..., 0] > 127 for image in batch["image"]]
    return {"uri": batch["path"], "pixel_count": [int(mask.sum()) for mask in masks]}


def main() -> None:
    images, output = sys.argv[1:3]
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    error = None
    try:
        rows = ray.data.read_images(images, include_paths=True, mode="RGB", override_num_blocks=4)
        rows.map_batches(segment, batch_size=4).write_parquet(output)
    except Exception as caught:
        error = type(caught).__name__
    written = list(Path(output).glob("*.parquet")) if Path(output).exists() else []
    table = pd.concat([pd.read_parquet(path) for path in written]) if written else pd.DataFrame({"uri": []})
    print(json.dumps({"rows": len(table), "distinct": int(table["uri"].nunique()), "error": error}))


if __name__ == "__main__":
    main()
