"""An image store that counts reads."""

from collections import Counter
from pathlib import Path

from fivefold.data.readers.stores import FolderStore


class CountingStore(FolderStore):
    """A folder store that counts how often it reads each file."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.reads[name] += 1
        return super().read(name)
