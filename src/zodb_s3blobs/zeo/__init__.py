"""The ZEO side: the server's handler of blobs, the errors that it sends, its start and its end."""
