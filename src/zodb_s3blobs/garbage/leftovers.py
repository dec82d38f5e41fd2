"""The uploads that a crashed server has left in the bucket."""

import logging
import time
from collections.abc import Iterator

from ..s3.bucket import Bucket
from ..s3.errors import BucketError
from ..s3.listing import ListedStaged, ListedUpload

logger = logging.getLogger(__name__)

#: A log line, no error of a pack: some services cannot list or abort multipart uploads, and each needs a permission.
UPLOADS_STAY = "Unfinished uploads of crashed servers stay behind. %s"

#: The least age in seconds of a leftover.
_ABANDONED = 24 * 3600.0


def abandoned_after(upload_timeout: float) -> float:
    """Return the age in seconds from which an upload is a leftover; a transaction may take ``upload_timeout``."""
    return max(_ABANDONED, 2 * upload_timeout)


def abandoned_staged(bucket: Bucket, age: float) -> Iterator[ListedStaged]:
    """Yield the staged objects that were completed more than ``age`` seconds ago. Waits for S3; BucketError."""
    before = time.time() - age
    return (found for found in bucket.list_staged() if found.modified.timestamp() < before)


def abandoned_uploads(bucket: Bucket, age: float) -> Iterator[ListedUpload]:
    """Yield the incomplete multipart uploads begun more than ``age`` seconds ago, which only a crash leaves behind.

    Waits for S3; logs its errors.
    """
    before = time.time() - age
    try:
        for upload in bucket.list_uploads():
            if upload.begun.timestamp() < before:
                yield upload
    except BucketError as error:
        logger.warning(UPLOADS_STAY, error)
