"""Segmentation: a bucket of images to Parquet."""
