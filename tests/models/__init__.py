"""Tests of segray.models."""
