"""The uploads that a crashed server has left in the bucket."""

import logging
import time
from collections.abc import Iterator

from ..s3.bucket import Bucket
from ..s3.errors import BucketError
from ..s3.listing import ListedUpload

logger = logging.getLogger(__name__)

#: A log line, no error of a pack: some services cannot list or abort multipart uploads, and each needs a permission.
UPLOADS_STAY = "Unfinished uploads of crashed servers stay behind. %s"


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
