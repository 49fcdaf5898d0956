"""A store of images that counts, for tests of several folders."""

from collections import Counter
from pathlib import Path

from fivefold.data.readers.stores import FolderStore


class CountingStore(FolderStore):
    """A folder that counts how often each of its files is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.reads[name] += 1
        return super().read(name)
