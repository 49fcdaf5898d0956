import pytest
import torch

from fivefold.inference.predictor import make_runtime

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "shape", [(2, 3, 224, 224), (5, 3, 7, 12), (1, 3, 1, 1), (1, 3, 8, 1), (4, 3, 1, 1), (4, 3, 1, 5)]
)
def test_normalised_images_equal_the_formula_exactly(channels_last, memory_format, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=GENERATOR).contiguous(
        memory_format=memory_format
    )
    original = images.clone()
    runtime = make_runtime(torch.device("cpu"), None, channels_last, MEAN, STD)
    expected = (images.float() - runtime.mean) / runtime.std
    normalised = runtime.images(images)
    assert torch.equal(normalised, expected)
    assert normalised.is_contiguous(memory_format=runtime.memory_format)
    assert torch.equal(images, original)


def test_runtimes_and_batch_sizes_share_no_buffers():
    runtime_a, runtime_b = (
        make_runtime(torch.device("cpu"), None, True, mean, STD) for mean in (MEAN, [0.1, 0.2, 0.3])
    )
    small, wide = (torch.full((2, 3, *size), 7, dtype=torch.uint8) for size in ((4, 6), (6, 4)))
    first = runtime_a.images(small)
    first_copy = first.clone()
    for runtime, images in ((runtime_a, wide), (runtime_b, small), (runtime_a, small)):
        assert torch.equal(runtime.images(images), (images.float() - runtime.mean) / runtime.std)
    assert torch.equal(first, first_copy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu_within_the_rounding_of_a_division():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR)
    cpu, gpu = (make_runtime(torch.device(name), None, True, MEAN, STD) for name in ("cpu", "cuda"))
    torch.testing.assert_close(gpu.images(images).cpu(), cpu.images(images), rtol=1e-6, atol=1e-6)
