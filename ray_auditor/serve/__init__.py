"""A finished sweep in a local browser: read only, on this machine's loopback, nothing from anywhere else."""
