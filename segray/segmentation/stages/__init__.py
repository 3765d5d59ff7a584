"""The stages of the Ray Data pipeline: decode, predict, write."""
