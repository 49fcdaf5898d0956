"""Objects at `s3://bucket/key`. `urls` and `attempts` need no client; the other modules load boto3, and are loaded late."""
