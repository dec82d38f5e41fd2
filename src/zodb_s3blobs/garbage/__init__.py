"""Garbage collection: the search for dead blobs, and their safe deletion."""
