"""Tests of segray.storage."""
