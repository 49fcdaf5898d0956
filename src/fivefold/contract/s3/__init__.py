"""Objects at `s3://bucket/key`. `urls` and `commit` need no client; the other modules import boto3, so import them late."""
