"""Images as a network sees them: one formula everywhere, the same bits whichever way they lie in memory."""

import pytest
import torch

from fivefold.inference.predictor import make_runtime

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DRAWN = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "shape", [(2, 3, 224, 224), (5, 3, 7, 12), (1, 3, 1, 1), (1, 3, 8, 1), (4, 3, 1, 1), (4, 3, 1, 5)]
)
def test_the_bits_are_those_of_the_formula(channels_last, given, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=DRAWN).contiguous(memory_format=given)
    before = images.clone()
    runtime = make_runtime(torch.device("cpu"), None, channels_last, MEAN, STD)
    expected = (images.float() - runtime.mean) / runtime.std
    found = runtime.images(images)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=runtime.memory_format)
    assert torch.equal(images, before)


def test_batches_of_several_sizes_and_runtimes_do_not_mix_and_none_is_overwritten():
    one, other = (make_runtime(torch.device("cpu"), None, True, mean, STD) for mean in (MEAN, [0.1, 0.2, 0.3]))
    small, wide = (torch.full((2, 3, *size), 7, dtype=torch.uint8) for size in ((4, 6), (6, 4)))
    first = one.images(small)
    kept = first.clone()
    for runtime, images in ((one, wide), (other, small), (one, small)):
        assert torch.equal(runtime.images(images), (images.float() - runtime.mean) / runtime.std)
    assert torch.equal(first, kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_they_are_the_cpus_within_the_rounding_of_a_division():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=DRAWN)
    cpu, gpu = (make_runtime(torch.device(name), None, True, MEAN, STD) for name in ("cpu", "cuda"))
    torch.testing.assert_close(gpu.images(images).cpu(), cpu.images(images), rtol=1e-6, atol=1e-6)
