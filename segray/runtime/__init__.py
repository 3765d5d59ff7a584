"""Ray: connection, capacity and autoscaling."""
