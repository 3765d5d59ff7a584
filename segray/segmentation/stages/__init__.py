"""Stages of the Ray Data pipeline: decode, predict, write."""
