"""A store whose images lie decoded in caches too: who reads images from a store so reads them from there, where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fivefold.data.cache import Cache
from fivefold.data.images import Pixels
from fivefold.data.store import FolderStore, ImageStore, JoinedStore, ZipStore


@dataclass(frozen=True)
class CachedStore:
    """The files of `store`, some of which `caches` hold decoded."""

    store: FolderStore | ZipStore
    caches: tuple[Cache, ...]

    @property
    def root(self) -> Path:
        return self.store.root

    def names(self) -> list[str]:
        return self.store.names()

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        return self.store.listing(folder)

    def exists(self, name: str) -> bool:
        return self.store.exists(name)

    def read(self, name: str) -> bytes:
        return self.store.read(name)


def caches_of(store: ImageStore | CachedStore, pixels: Pixels) -> tuple[Cache, ...]:
    """The caches that hold images of a store as these pixels."""
    if isinstance(store, JoinedStore):
        return tuple(cache for each in store.stores.values() for cache in caches_of(each, pixels))
    return tuple(cache for cache in getattr(store, "caches", ()) if cache.pixels == pixels)


def with_caches(store: FolderStore | ZipStore, caches: Sequence[Cache]) -> FolderStore | ZipStore | CachedStore:
    """The store with what caches hold of it; the store itself where there are none."""
    return CachedStore(store, tuple(caches)) if caches else store
