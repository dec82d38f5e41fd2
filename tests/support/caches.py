"""What a process of the tests reads or works out once, and not again for each client of S3 and each server."""

import contextlib
import functools
import gc
import inspect

import botocore.hooks
import botocore.session
import ZConfig
import ZEO.runzeo

from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.bucket import Bucket
from zodb_s3blobs.s3.client import BucketSettings
from zodb_s3blobs.s3.errors import BucketError


def fill(replace=setattr):
    """Let boto3 and ZConfig remember what they would find out again each time, with the same result.

    And let garbage collections pass over all that there is now: a ZEO server of the published suites, and RelStorage
    whenever it opens or packs, collects garbage, which takes a third of a second for all modules and tests.

    ``replace``: called with an object, the name of an attribute and its new value.
    """
    # The description of S3: a tenth of a second.
    replace(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
    # A client asks for the signatures of a hundred functions of botocore: a third of its time.
    replace(botocore.hooks, "accepts_kwargs", _accepts_kwargs)
    # The schema of a zeo.conf: 10 milliseconds. An %import extends a copy of it.
    replace(ZConfig, "loadSchema", functools.cache(ZConfig.loadSchema))
    _do_all_once()
    gc.collect()
    gc.freeze()


def _do_all_once():
    """Load the schema and send a request, which nobody answers: the first time they read and import more."""
    bucket = Bucket(
        BucketSettings(
            "bucket",
            s3_endpoint_url="http://127.0.0.1:1",
            s3_region="us-east-1",
            s3_access_key="test",
            s3_secret_key="test",
            s3_max_attempts=1,
        ),
        Metrics(),
    )
    with contextlib.suppress(BucketError):
        next(bucket.list_blobs())
    bucket.close()
    ZEO.runzeo.ZEOOptions().load_schema()


def _accepts_kwargs(function):
    code = getattr(function, "__code__", None)  # that of a method is its function's
    if code is None:
        return inspect.getfullargspec(function).varkw is not None
    return bool(code.co_flags & inspect.CO_VARKEYWORDS)
