"""`s3://bucket/key`: the URL of an object or of a prefix."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from fivefold.errors import SettingsError

SCHEME = "s3"
MAX_NAME_BYTES = 255
"""Bytes of the longest file name of common file systems."""


@dataclass(frozen=True, order=True)
class Url:
    """A bucket and a key in it, without slashes at its start and end."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> "Url":
        return Url(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "Url":
        """Return the parent URL; for a bucket the bucket itself."""
        return Url(self.bucket, self.key.rpartition("/")[0])

    def relative_to(self, other: "Url") -> str:
        """Return the key relative to `other`."""
        return self.key.removeprefix(f"{other.key}/" if other.key else "")


def is_url(text: str) -> bool:
    return "://" in text


def has_long_name(key: str) -> bool:
    """Return whether a part of a key is longer than a file name may be."""
    return any(len(name.encode()) > MAX_NAME_BYTES for name in key.split("/"))


def parse(text: str, where: str) -> Url:
    """Parse a URL; raise a SettingsError that names the variable `where` if it is invalid."""
    parts = urlsplit(text)
    if parts.scheme.lower() != SCHEME:
        raise SettingsError(
            f"{where} is a {parts.scheme}:// URL, and only {SCHEME}://bucket/prefix is supported; "
            "for another store with S3's protocol set AWS_ENDPOINT_URL_S3"
        )
    if "@" in parts.netloc:  # do not print the text: the part before @ may be a key
        raise SettingsError(f"{where} contains a user or a key; credentials must come from the environment or a role")
    names = [name for name in text.partition("://")[2].split("/") if name]
    if not parts.netloc or not names or {".", ".."} & set(names) or has_long_name(text):
        raise SettingsError(
            f"{where}={text} must be {SCHEME}://bucket/prefix, without . and .. and names of more than {MAX_NAME_BYTES} bytes"
        )
    return Url(names[0], "/".join(names[1:]))
