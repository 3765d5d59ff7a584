"""Clusters launched for real, on hosts that are namespaces of this machine."""
