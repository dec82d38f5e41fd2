"""The S3 side: the bucket, its client, errors, metrics and keys. No other package uses boto3."""
