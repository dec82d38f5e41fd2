"""What processes of tests have before they begin: only the server that they are forked from imports this."""
# ruff: noqa: F401

import functools

import boto3
import botocore.session
import psycopg2
import pymysql
import relstorage.adapters.mysql
import relstorage.adapters.postgresql
import relstorage.adapters.sqlite.adapter
import relstorage.config
import zc.zlibstorage
import ZEO.runzeo
import ZEO.StorageServer
import ZODB.DemoStorage
import ZODB.MappingStorage

import zodb_s3blobs.bases.relstorage
import zodb_s3blobs.cli
import zodb_s3blobs.config
import zodb_s3blobs.zeo
from tests.support import relstorage_databases as relational
from tests.support import sites

# As the fixture `shared_loader` of conftest.py. The description of S3 is read by the first client.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)
keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test-secret"}  # or it asks the network for them
boto3.session.Session().client("s3", region_name="us-east-1", **keys)
