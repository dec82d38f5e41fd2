"""Uploads that a crash has left in the bucket."""

import logging
import time
from collections.abc import Iterator

from ..s3.bucket import Bucket
from ..s3.errors import BucketError
from ..s3.listing import ListedUpload

logger = logging.getLogger(__name__)

#: Not a reason to let a pack fail: some services cannot list or abort them, and each takes a permission of its own.
UPLOADS_STAY = "Unfinished uploads of crashed servers stay behind. %s"


def abandoned_uploads(bucket: Bucket, age: float) -> Iterator[ListedUpload]:
    """The uploads in parts that were begun more than ``age`` seconds ago: whoever did it lives no more."""
    before = time.time() - age
    try:
        for upload in bucket.list_uploads():
            if upload.begun.timestamp() < before:
                yield upload
    except BucketError as error:
        logger.warning(UPLOADS_STAY, error)
