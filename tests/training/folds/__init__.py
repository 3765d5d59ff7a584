"""Tests of segray.training.folds."""
