"""Arrow schemas of the Parquet files that segray writes. Column names are public interface.

Every schema is explicit: a column inferred from rows that are all null would be written with type null.
"""

from importlib.metadata import version

import pyarrow as pa

_LIBRARIES = ("segray", "ray", "torch", "torchvision", "segmentation-models-pytorch", "pyarrow", "numpy", "pillow")

PLAN_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),  # Null if the input is a text list, or a manifest without this column.
        ("etag", pa.string()),  # Entity tag that the content must have when it is read; null accepts any.
        ("mask_uri", pa.string()),  # Null without ground truth, or if the image has no mask.
        ("mask_etag", pa.string()),
        ("fragment", pa.int64()),
    ]
)

IMAGES_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("status", pa.string()),  # "ok" or "error".
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
        ("note", pa.string()),  # On an ok row: a remark on the image, such as "first of 12 frames".
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask", pa.large_binary()),  # Large: 64 masks of 40 megapixels exceed the 2 GiB of type binary.
        ("mask_encoding", pa.string()),  # "raw" or "png".
        ("pixel_count", pa.list_(pa.int64())),
        ("mean_confidence", pa.list_(pa.float32())),
        ("entropy", pa.float32()),  # In nats.
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
        ("image_count", pa.int64()),  # Images in which the class was predicted.
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
    """Return the versions, by package name, of the libraries that can change the results of a run."""
    return {name: version(name) for name in _LIBRARIES}
