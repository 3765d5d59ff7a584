"""Tests of segray.segmentation.stages."""
