"""Evaluate the IAM policies in docs/; only the parts that they use: Allow, `*` and a few conditions."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DOCS = Path(__file__).parents[1] / "docs"
PLACES = {"ACCOUNT": "123456789012", "BUCKET": "bucket", "DATA": "data", "PREFIX": "runs", "ROLE": "fivefold"}
OPERATORS = {
    "StringEquals": lambda value, expected: value == expected,
    "StringLike": lambda value, pattern: value is not None and fnmatchcase(value, pattern),
    "ArnLikeIfExists": lambda value, pattern: value is None or fnmatchcase(value, pattern),
}


class Policy:
    """A policy in docs/ with its placeholders (BUCKET and others) filled in."""

    def __init__(self, name: str, **places: str) -> None:
        text = (DOCS / name).read_text(encoding="utf-8")
        for placeholder, value in {**PLACES, **places}.items():
            text = text.replace(placeholder, value)
        self.statements = json.loads(text)["Statement"]

    def allows(self, action: str, resource: str = "*", **context: str) -> bool:
        """Return whether a statement allows the action; `context` has the values of conditions: prefix="a/" for s3:prefix."""
        return any(
            action in statement["Action"]
            and any(fnmatchcase(resource, pattern) for pattern in as_list(statement.get("Resource", "*")))
            and conditions_hold(statement.get("Condition", {}), context)
            for statement in self.statements
        )

    def allows_request(self, method: str, path: str) -> bool:
        """Return whether the policy allows a request of S3's protocol, with the bucket in its path."""
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
        """Return which of Get, Put and Delete are allowed on an object."""
        return {
            name for name in ("Get", "Put", "Delete") if self.allows(f"s3:{name}Object", f"arn:aws:s3:::{bucket}/{key}")
        }


def conditions_hold(conditions: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    return all(
        any(OPERATORS[operator](context.get(key.partition(":")[2]), value) for value in as_list(expected))
        for operator, tests in conditions.items()
        for key, expected in tests.items()
    )


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]
