"""Tests of segray.runs."""
