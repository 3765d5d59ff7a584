"""Distributed inference with Ray Data: a bucket of images to Parquet."""
