"""Tests of segray.training.tuning."""
