import http.server
import threading
import time
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fivefold.errors import MissingInputError, RetryableError, SettingsError
from fivefold.models import pretrained
from fivefold.models.pretrained import Published, find_cached, find_file, find_weights, published

LITE = "timm/tf_efficientnet_lite0"
NAMED = ("timm/test_resnet", "torchvision/resnet18", "efficientnet_pytorch/efficientnet-b0")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """Caches without a file, and a proxy that refuses every connection."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for variable in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")


def install_package(site: Path, monkeypatch, name: str = "net-weights") -> Path:
    """Install a package that carries weights, as pip does: its files and a RECORD of them."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-0.1.0.dist-info"
    file = site / module / "models" / "net-57934424.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    (site / info).mkdir()
    (site / info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (site / info / "RECORD").write_text(f"{module}/__init__.py,,\n{module}/models/{file.name},,\n{info}/RECORD,,\n")
    monkeypatch.syspath_prepend(str(site))
    return file


def cache_in_hub(root: Path, repository: str, name: str = "model.safetensors") -> Path:
    """Put a file where the Hugging Face hub's client keeps it."""
    folder = root / "hf" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    file = folder / "snapshots" / ("0" * 40) / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    return file


def test_each_family_tells_what_its_weights_expect():
    lite = published(LITE)
    assert (lite.size, lite.mean, lite.std, lite.interpolation) == ((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert (lite.repository, lite.licence) == ("timm/tf_efficientnet_lite0.in1k", "apache-2.0")
    assert published("timm/tf_efficientnet_lite2").size == (260, 260)
    resnet = published("torchvision/resnet18")
    assert (resnet.size, resnet.mean[0], resnet.interpolation) == ((224, 224), 0.485, "bilinear")
    assert resnet.url.endswith("resnet18-f37072fd.pth")
    b3 = published("efficientnet_pytorch/efficientnet-b3")
    assert (b3.size, b3.interpolation) == ((300, 300), "bicubic")
    for name in (
        "fivefold/small_net",
        "timm/resnet1888",
        "torchvision/none",
        "efficientnet_pytorch/none",
        "timm/gluon",
    ):
        assert published(name) is None


def test_a_file_is_found_at_its_path_in_the_channel_or_alone(tmp_path):
    channel = tmp_path / "weights"
    channel.mkdir()
    (channel / "notes.txt").touch()
    assert find_file("", channel) is None
    assert find_file("", None) is None
    file = channel / "start.pth"
    file.touch()
    assert (
        find_file("", channel).path == find_file("start.pth", channel).path == find_file(str(file), None).path == file
    )
    with pytest.raises(MissingInputError):
        find_file("other.pth", channel)
    (channel / "more").mkdir()
    (channel / "more" / "second.safetensors").touch()
    with pytest.raises(SettingsError, match="second"):
        find_file("", channel)
    assert find_file("start.pth", channel).path == file


def test_the_search_takes_caches_then_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, LITE, ("net-weights", "Apache-2.0"))
    with pytest.raises(MissingInputError, match="net-weights"):
        find_weights(LITE, "auto", offline=True)
    packaged = install_package(tmp_path / "site", monkeypatch)
    found = find_weights(f"{LITE}.in1k", "auto", offline=True)
    assert (found.path, found.source) == (packaged, "package net-weights 0.1.0")
    assert found.describe() == {
        "file": packaged.name, "source": found.source, "licence": "Apache-2.0", "sha256": sha256(b"weights").hexdigest()
    }  # fmt: skip
    with pytest.raises(MissingInputError):
        find_weights(LITE, True, offline=True)  # only the hub's
    cached = cache_in_hub(tmp_path, "timm/tf_efficientnet_lite0.in1k")
    for choice in ("auto", True):
        found = find_weights(LITE, choice, offline=True)
        assert (found.path, found.source, found.licence) == (
            cached,
            "hf-hub:timm/tf_efficientnet_lite0.in1k",
            "apache-2.0",
        )


@pytest.mark.parametrize("name", NAMED[1:])
def test_the_cache_of_torch_hub_is_searched(name, tmp_path):
    path = tmp_path / "torch" / "hub" / "checkpoints" / Path(published(name).url).name
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_weights(name, True, offline=True).path == path


def test_an_older_file_format_in_the_hub_cache_is_found(tmp_path):
    file = cache_in_hub(tmp_path, "timm/net", "pytorch_model.bin")
    assert find_cached(Published(repository="timm/net")).path == file


@pytest.mark.parametrize("name", NAMED)
def test_a_hub_out_of_reach_is_a_retryable_error_that_names_the_ways(name):
    start = time.monotonic()
    with pytest.raises(RetryableError, match=r"model\.weights=PATH"):
        find_weights(name, "auto")
    assert time.monotonic() - start < 2 * pretrained.HUB_TIMEOUT_S


def test_a_backbone_without_weights_is_an_error():
    for choice in ("auto", True):
        with pytest.raises(SettingsError):
            find_weights("fivefold/small_net", choice)


def test_a_download_is_checked_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "net.safetensors")
    content = (tmp_path / "net.safetensors").read_bytes()
    good, bad = f"net-{sha256(content).hexdigest()[:8]}.pth", "net-00000000.pth"
    for name in (good, bad):
        (tmp_path / name).write_bytes(content)
    handler = partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        missing = Published(url=f"http://127.0.0.1:{server.server_port}/none.pth")
        monkeypatch.setattr(pretrained, "published", lambda _: missing)
        with pytest.raises(RetryableError, match="FileNotFoundError"):
            find_weights("timm/net", True)
        for name in (good, bad):
            offer = Published(url=f"http://127.0.0.1:{server.server_port}/{name}")
            monkeypatch.setattr(pretrained, "published", lambda _, offer=offer: offer)
            if name == bad:
                with pytest.raises(RetryableError):
                    find_weights("timm/net", True)
            else:
                assert find_weights("timm/net", True).path.read_bytes() == content
            assert (find_cached(offer) is None) == (name == bad)
        server.shutdown()
