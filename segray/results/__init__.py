"""Reads finished runs; needs no model, no Ray and no torch."""
