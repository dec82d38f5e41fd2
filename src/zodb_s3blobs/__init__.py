"""ZODB blobs in S3-compatible object storage, as a plugin of the ZEO server.

A `<s3blobstorage>` section wraps a base storage. The base keeps the object records; blobs go to a bucket, through one
file cache. To read the code, begin with config.py, which builds the parts; then storage.py, the ZODB contract; then
commit.py, the way in, and fetch.py, the way out; then s3/, which alone knows boto3. README.md beside the package has
figures, files and a glossary.
"""

#: The version of the package; the build reads it here.
__version__ = "2.0.0"
