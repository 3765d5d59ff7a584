"""Tests of segray.segmentation."""
