"""Tests of segray.segmentation.planning."""
