"""Tests of segray.runtime."""
