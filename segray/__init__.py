"""segray: distributed image segmentation on Ray. ``segray.cli`` lists the verbs; the README draws the house."""

from importlib.metadata import version

__version__ = version("segray")
