"""Run the ``zodb-s3blobs`` command as ``python -m zodb_s3blobs``."""

import sys

from .cli import main

sys.exit(main())
