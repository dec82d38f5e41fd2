"""The base class of this package's errors."""


class S3BlobsError(Exception):
    """An error of this package. Its text is a sentence for the person who must act, and holds no secret."""
