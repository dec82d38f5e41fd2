"""Tests of zodb-s3blobs, in rooms that mirror the package; README.md tells which run when."""
