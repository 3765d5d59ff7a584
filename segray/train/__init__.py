"""The only way from labelled images to a bundle."""
