"""Training: labelled images to a model bundle."""
