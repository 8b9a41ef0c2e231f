"""Bytes to requests and responses to bytes. Knows nothing of workers, and of applications only the `Handler` seam."""
