"""Tests of segray.training."""
