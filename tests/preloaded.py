"""What processes of tests have before they begin: only the server that they are forked from imports this."""

import functools

import botocore.session
import psycopg2  # noqa: F401
import relational  # noqa: F401
import relstorage.adapters.postgresql
import relstorage.adapters.sqlite.adapter
import relstorage.config  # noqa: F401
import sites  # noqa: F401

import zodb_s3blobs.bases.relstorage
import zodb_s3blobs.cli
import zodb_s3blobs.config  # noqa: F401

# As the fixture `shared_loader` of conftest.py. The description of S3 is read by the first client.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)
botocore.session.get_session().create_client("s3", region_name="us-east-1")
