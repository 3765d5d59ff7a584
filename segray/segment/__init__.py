"""The only way from a bucket of images to Parquet."""
