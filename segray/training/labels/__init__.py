"""The label check: open every image and mask, and report every problem before training."""
