"""What the policies of docs/ allow: as much of IAM's evaluation as they use, which is Allow, `*` and a few conditions."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DOCS = Path(__file__).parents[1] / "docs"
PLACES = {"ACCOUNT": "123456789012", "BUCKET": "bucket", "DATA": "data", "PREFIX": "runs", "ROLE": "fivefold"}
OPERATORS = {
    "StringEquals": lambda value, wanted: value == wanted,
    "StringLike": lambda value, wanted: value is not None and fnmatchcase(value, wanted),
    "ArnLikeIfExists": lambda value, wanted: value is None or fnmatchcase(value, wanted),
}


class Policy:
    """A policy of docs/, with the names of a bucket and the like put in."""

    def __init__(self, name: str, **places: str) -> None:
        text = (DOCS / name).read_text(encoding="utf-8")
        for word, value in {**PLACES, **places}.items():
            text = text.replace(word, value)
        self.statements = json.loads(text)["Statement"]

    def allows(self, action: str, resource: str = "*", **context: str) -> bool:
        """Whether a statement allows it; `context` has the values of conditions: prefix="a/" for s3:prefix."""
        return any(
            action in statement["Action"]
            and any(fnmatchcase(resource, pattern) for pattern in as_list(statement.get("Resource", "*")))
            and meets(statement.get("Condition", {}), context)
            for statement in self.statements
        )

    def allows_request(self, method: str, path: str) -> bool:
        """Whether it allows a request of S3's protocol, with the bucket in its path."""
        parts = urlsplit(path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        if not key:
            return method == "GET" and self.lists(bucket, query["prefix"][0])
        actions = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "POST": "PutObject"}
        deletes = "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
        return self.allows(f"s3:{actions.get(method, deletes)}", f"arn:aws:s3:::{bucket}/{key}")

    def lists(self, bucket: str, prefix: str) -> bool:
        return self.allows("s3:ListBucket", f"arn:aws:s3:::{bucket}", prefix=prefix)

    def of_objects(self, bucket: str, key: str) -> set[str]:
        """What may be done with an object: Get, Put, Delete."""
        return {
            name for name in ("Get", "Put", "Delete") if self.allows(f"s3:{name}Object", f"arn:aws:s3:::{bucket}/{key}")
        }


def meets(conditions: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    return all(
        any(OPERATORS[operator](context.get(key.partition(":")[2]), value) for value in as_list(wanted))
        for operator, tests in conditions.items()
        for key, wanted in tests.items()
    )


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]
