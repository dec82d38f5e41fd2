"""ZODB blobs in S3-compatible object storage, as a plugin of the ZEO server."""
