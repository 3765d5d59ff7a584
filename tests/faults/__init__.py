"""Runs against a real object store with faults put in between."""
