"""The storages that `S3BlobStorage` can wrap."""
