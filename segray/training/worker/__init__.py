"""Code that runs on each training worker (rank)."""
