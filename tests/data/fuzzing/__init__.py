"""Mutated image files for fuzzing the decoders; each depends only on a seed and an index."""
