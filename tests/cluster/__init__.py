"""Tests that launch real clusters, on hosts that are Linux namespaces of this machine."""
