"""The file cache of committed blobs on the server's disk."""
