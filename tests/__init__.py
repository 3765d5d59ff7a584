"""Tests of segray; the files mirror the package."""
