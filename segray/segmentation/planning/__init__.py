"""Planning of a run: listing of the input images, and binding of the output folder to the run."""
