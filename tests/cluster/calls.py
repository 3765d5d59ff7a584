"""The two jobs as the cluster tests submit them, and what they find in the bucket."""

import yaml

from segray.config import IMAGE_EXTENSIONS, TrainConfig
from tests.faults.object_store import ObjectStore
from tests.faults.scene import BUCKET, SETTINGS

BUCKET_URI = f"s3://{BUCKET}"
NUM_EPOCHS = 20


def build_segment_call(output: str, **settings: object) -> list[str]:
    """Return what `ray job submit` is given to segment the bucket's images.

    By default there is a file for each image: of so small a bucket this leaves something to do after a fault. There are
    more predictors than CPUs will be left, when one of three nodes has died.
    """
    call = ["jobs/segment.py", "--bundle", f"{BUCKET_URI}/bundle", "--images", f"{BUCKET_URI}/images"]
    call += ["--masks", f"{BUCKET_URI}/masks", "--output", f"{BUCKET_URI}/{output}"]
    merged = {**SETTINGS, "fragment_size": 1, "num_predictors": 3, **settings}
    return call + [part for name, value in merged.items() for part in ("--set", f"segment.{name}={value}")]


def build_training_config() -> bytes:
    """Return a configuration that trains two workers on the bucket's shapes, as YAML."""
    config = TrainConfig.model_validate(
        {
            "data": {"layout": {"oxford_iiit_pet": {"root": f"{BUCKET_URI}/shapes"}}},
            "model": {"arch": "classic_unet", "widths": [8, 16]},
            "image_size": [64, 64],
            "train": {
                "num_epochs": NUM_EPOCHS,
                "global_batch_size": 6,
                "num_train_workers": 2,
                "precision": "fp32",
                "eval_every_epochs": 5,
            },
            "output": f"{BUCKET_URI}/trained",
        }
    )
    return yaml.safe_dump(config.model_dump(mode="json")).encode()


def list_keys(store: ObjectStore, prefix: str) -> list[str]:
    """Return the keys below a prefix of the bucket."""
    pages = store.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


def list_image_uris(store: ObjectStore) -> list[str]:
    """Return the URIs of all images that a segmentation of the bucket has to do."""
    keys = list_keys(store, "images/")
    return [f"{BUCKET_URI}/{key}" for key in keys if key.lower().endswith(IMAGE_EXTENSIONS)]
