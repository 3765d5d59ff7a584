"""Tests of segray.training.worker."""
