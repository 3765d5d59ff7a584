"""Tests of segray.training.labels."""
