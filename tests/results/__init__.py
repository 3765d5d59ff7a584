"""Tests of segray.results."""
