"""Segment a folder with PySpark as its guide shows it: binaryFile, predict_batch_udf, Parquet.

python benchmarks/rivals/spark.py BUNDLE IMAGES OUTPUT fp32|bf16
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, ByteType, IntegerType, LongType, StructField, StructType

_ROW = StructType(
    [
        StructField("height", IntegerType()),
        StructField("width", IntegerType()),
        StructField("mask", ArrayType(ByteType())),  # predict_batch_udf does not support binary columns.
        StructField("pixel_count", ArrayType(LongType())),
    ]
)


def _describe(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in the types that predict_batch_udf accepts."""
    arrays = {"mask": np.frombuffer(row["mask"], np.int8), "pixel_count": np.array(row["pixel_count"], np.int64)}
    return {"height": row["height"], "width": row["width"], **arrays}


def make_predict(bundle: str, precision: str) -> Callable[[], Callable[[npt.NDArray[Any]], list[dict[str, Any]]]]:
    """Return the function that Spark calls once in each of its Python workers to load the model."""

    def make() -> Callable[[npt.NDArray[Any]], list[dict[str, Any]]]:
        import torch
        from model import Model

        model = Model(bundle, precision)

        def predict(contents: npt.NDArray[Any]) -> list[dict[str, Any]]:
            decoded = [model.decode(bytes(content)) for content in contents]
            masks = model.predict(torch.stack([image for image, _ in decoded]), [size for _, size in decoded])
            return [_describe(model.describe("", mask)) for mask in masks]

        return predict

    return make


def main() -> None:
    """Read images, predict masks and write Parquet."""
    bundle, images, output, precision = sys.argv[1:]
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.driver.memory", "4g")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "64")
        .getOrCreate()
    )
    predict = predict_batch_udf(make_predict(bundle, precision), return_type=_ROW, batch_size=8)
    files = spark.read.format("binaryFile").load(images).select("path", "content")
    files.select("path", predict("content").alias("row")).select("path", "row.*").write.parquet(output)
    spark.stop()


if __name__ == "__main__":
    main()
