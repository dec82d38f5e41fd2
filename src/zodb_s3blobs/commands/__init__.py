"""The subcommands of ``zodb-s3blobs``, one module or package each."""
