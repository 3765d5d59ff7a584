"""What a run works on: the listing of images, and the run folder it belongs to."""
