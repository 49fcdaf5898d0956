"""What Arrow is spared, and that nothing is lost by it; in a process of its own, since imports are for ever."""

import subprocess
import sys

PROGRAM = """
import sys
import numpy as np
from fivefold.arrow import pa
import jobs.split

column = pa.array(np.arange(3))
assert column.to_numpy().tolist() == [0, 1, 2]
assert pa.array(["a", None]).to_numpy(zero_copy_only=False).tolist() == ["a", None]
print(sorted({"pandas", "torch", "sklearn", "scipy", "matplotlib"} & set(sys.modules)))
frame = pa.table({"a": column}).to_pandas()
assert type(frame).__name__ == "DataFrame" and frame["a"].sum() == 3
"""


def test_arrow_and_the_split_stage_load_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
