"""Garbage collection: which blobs are dead, and their safe deletion."""
