"""Reads the results of segmentation runs. Needs neither a model nor Ray nor torch."""
