"""The ZEO server: its handler of blobs, the errors it sends, its start and its end."""
