"""The run folder that segmentation writes and results reads."""
