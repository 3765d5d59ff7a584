"""Tests that inject faults between segray and a real object store."""
