"""Arrow schemas of what segray writes. Column names are public interface.

Every schema is explicit, because a column whose first rows are all null would otherwise be written as type null.
"""

from importlib.metadata import version

import pyarrow as pa

_LIBRARIES = ("segray", "ray", "torch", "torchvision", "segmentation-models-pytorch", "pyarrow", "numpy", "pillow")

PLAN_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),  # null where a list names the image
        ("etag", pa.string()),  # what its content has to be known by when it is read; null where a list names it
        ("mask_uri", pa.string()),  # null without ground truth, and where an image has no mask
        ("mask_etag", pa.string()),
        ("fragment", pa.int64()),
    ]
)

IMAGES_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("status", pa.string()),  # ok | error
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
        ("note", pa.string()),  # of an ok row: what a reader should know, such as "first of 12 frames"
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask", pa.large_binary()),  # large: 64 masks of 40 megapixels pass the 2 GiB of an ordinary binary column
        ("mask_encoding", pa.string()),  # raw | png
        ("pixel_count", pa.list_(pa.int64())),
        ("mean_confidence", pa.list_(pa.float32())),
        ("entropy", pa.float32()),  # nats
        ("tp_px", pa.list_(pa.int64())),
        ("fp_px", pa.list_(pa.int64())),
        ("fn_px", pa.list_(pa.int64())),
        ("iou", pa.list_(pa.float64())),
        ("dice", pa.list_(pa.float64())),
    ]
)

SUMMARY_SCHEMA = pa.schema(
    [
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("image_count", pa.int64()),  # images in which the class was predicted
        ("pixel_count", pa.int64()),
        ("tp_px", pa.int64()),
        ("fp_px", pa.int64()),
        ("fn_px", pa.int64()),
        ("dataset_iou", pa.float64()),
        ("dataset_dice", pa.float64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("mean_image_iou", pa.float64()),
        ("mean_image_dice", pa.float64()),
    ]
)


def get_library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what a run computes."""
    return {name: version(name) for name in _LIBRARIES}
