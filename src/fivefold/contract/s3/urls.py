"""`s3://bucket/key`: where an object, or all below a prefix, lies."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from fivefold.errors import SettingsError

SCHEME = "s3"


@dataclass(frozen=True, order=True)
class Url:
    """A bucket and a key in it, which starts and ends with no slash."""

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
        """The URL above; of a whole bucket itself."""
        return Url(self.bucket, self.key.rpartition("/")[0])

    def below(self, other: "Url") -> str:
        """The rest of the key below `other`."""
        return self.key.removeprefix(f"{other.key}/" if other.key else "")


def is_url(text: str) -> bool:
    return "://" in text


def parse(text: str, where: str) -> Url:
    """The URL that `text` is; a SettingsError that names `where` it was given otherwise."""
    parts = urlsplit(text)
    if parts.scheme.lower() != SCHEME:
        raise SettingsError(
            f"{where} is a URL of the kind {parts.scheme}://, and only {SCHEME}://bucket/prefix is read and written; "
            "for another store that speaks S3's protocol, name it by AWS_ENDPOINT_URL_S3"
        )
    if "@" in parts.netloc:  # not shown: what stands before it may be a key
        raise SettingsError(f"{where} holds a user or a key; credentials come from the environment or a role alone")
    names = [name for name in text.partition("://")[2].split("/") if name]
    if not parts.netloc or not names or {".", ".."} & set(names):
        raise SettingsError(f"{where}={text} names no place: it must be {SCHEME}://bucket/prefix")
    return Url(names[0], "/".join(names[1:]))
