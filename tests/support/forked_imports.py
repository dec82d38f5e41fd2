"""What processes of tests have before they begin: only the server that they are forked from imports this."""
# ruff: noqa: F401

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
from tests.support import caches, sites
from tests.support import relstorage_databases as relational

caches.fill()
