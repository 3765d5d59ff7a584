"""The folder of a segmentation run: written by ``segmentation``, read by ``results``."""
