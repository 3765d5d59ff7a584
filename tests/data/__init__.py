"""Tests of segray.data."""
