"""All that knows S3 and boto3: the bucket, its client, errors, figures and keys."""
