"""Tests of segray.config."""
