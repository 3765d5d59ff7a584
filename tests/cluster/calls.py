"""The two jobs that the cluster tests submit, and listings of the bucket."""

import yaml

from segray.config import IMAGE_EXTENSIONS, TrainConfig
from tests.faults.buckets import S3Bucket
from tests.faults.object_store import ObjectStore
from tests.faults.scene import SETTINGS

BUCKET_URI = S3Bucket.uri
NUM_EPOCHS = 10


def build_segment_call(output: str, **settings: object) -> list[str]:
    """Return the arguments of `ray job submit` that segment the bucket's images.

    By default each image is a fragment, so that even in this small bucket some work is left after a fault, and there
    are more predictors than CPUs remain when one of three nodes has died.
    """
    call = ["jobs/segment.py", "--bundle", f"{BUCKET_URI}/bundle", "--images", f"{BUCKET_URI}/images"]
    call += ["--masks", f"{BUCKET_URI}/masks", "--output", f"{BUCKET_URI}/{output}"]
    merged = {**SETTINGS, "fragment_size": 1, "num_predictors": 3, **settings}
    return call + [part for name, value in merged.items() for part in ("--set", f"segment.{name}={value}")]


def build_training_config() -> bytes:
    """Return a configuration that trains on the bucket's shapes with two workers, as YAML."""
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
    """Return the keys of the bucket that begin with a prefix."""
    return S3Bucket(store).list_keys(prefix)


def list_image_uris(store: ObjectStore) -> list[str]:
    """Return the URIs of all images that a segmentation of the bucket processes."""
    keys = list_keys(store, "images/")
    return [f"{BUCKET_URI}/{key}" for key in keys if key.lower().endswith(IMAGE_EXTENSIONS)]
