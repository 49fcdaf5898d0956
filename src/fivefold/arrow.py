"""pyarrow as `pa`, spared the import of pandas: half a second and 40 MB at its first conversion.

pyarrow looks for pandas once, so it is shown none for that moment. A later `to_pandas()` works all
the same: it looks again.
"""

import importlib.abc
import sys

import pyarrow as pa


class _Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def _look_for_pandas_in_vain() -> None:
    absent = _Absent()
    sys.meta_path.insert(0, absent)
    try:
        # Two places in pyarrow look, one on each way.
        pa.array([0]).to_numpy()
    finally:
        sys.meta_path.remove(absent)


if "pandas" not in sys.modules:
    _look_for_pandas_in_vain()

__all__ = ["pa"]
