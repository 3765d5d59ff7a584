"""Tests that run on a GPU if one is available, and otherwise on the CPU."""
