"""Tests that run on a GPU where there is one, and on the CPU otherwise."""
