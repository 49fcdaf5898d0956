"""`train` and `peer` on a GPU: ConvNeXt-Tiny and EfficientNet-B5 in bf16, where the loader has to keep up with it."""

from collections.abc import Iterator

from benchmarks.cases import GPU_CASES
from benchmarks.options import Options
from benchmarks.peer import against_timm
from benchmarks.results import Finding
from benchmarks.train import against_resident

PEER = " peer"


def measure(options: Options) -> Iterator[Finding]:
    """Both ratios of each network."""
    for name in options.chosen([*GPU_CASES, *(each + PEER for each in GPU_CASES)]):
        case = name.removesuffix(PEER)
        alone = name == case
        yield against_resident(case, GPU_CASES, options) if alone else against_timm(case, name, GPU_CASES, options)
