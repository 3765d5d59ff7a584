"""The label check: every image and mask is opened and every problem reported before training."""
