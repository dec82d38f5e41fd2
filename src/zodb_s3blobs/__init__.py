"""ZODB blobs in S3-compatible object storage, as a plugin of the ZEO server."""

#: The version of the package; the build reads it here.
__version__ = "2.0.0"
