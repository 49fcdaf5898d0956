import threading
from hashlib import sha256

import numpy as np
import pytest

from fivefold.data.pipeline import feature_cache
from fivefold.data.pipeline.feature_cache import get_or_compute, load_or_fit, name_of

DIGESTS = [sha256(bytes([row])).hexdigest() for row in range(10)]


class Backbone:
    """Features [rows, 2, 3] that tell the digest; it remembers the rows that it computed."""

    def __init__(self, digests=DIGESTS):
        self.digests, self.computed = digests, []

    def __call__(self, rows):
        self.computed += [self.digests[row] for row in rows]
        return np.array([np.full((2, 3), int(self.digests[row][:6], 16)) for row in rows], np.float32)


def check(features: np.ndarray, digests=DIGESTS) -> None:
    assert features.shape == (len(digests), 2, 3)
    assert features[:, 0, 0].tolist() == [int(digest[:6], 16) for digest in digests]


def test_features_are_computed_once_and_added(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "CHUNK_IMAGES", 3)
    backbone = Backbone()
    check(get_or_compute(tmp_path / "cache", DIGESTS[:7], backbone), DIGESTS[:7])
    check(get_or_compute(tmp_path / "cache", DIGESTS, backbone))
    check(get_or_compute(tmp_path / "cache", DIGESTS[::-1], backbone), DIGESTS[::-1])
    assert backbone.computed == DIGESTS


def test_equal_images_are_computed_once(tmp_path):
    digests = [*DIGESTS[:2], DIGESTS[0]]
    backbone = Backbone(digests)
    check(get_or_compute(tmp_path / "cache", digests, backbone), digests)
    assert len(backbone.computed) == 2


@pytest.mark.parametrize("digests", [DIGESTS, [*DIGESTS[:3], None]], ids=["no folder", "no digest"])
def test_without_a_folder_or_a_digest_nothing_is_kept(digests, tmp_path):
    folder = None if None not in digests else tmp_path / "cache"
    get_or_compute(folder, digests, lambda rows: np.zeros((len(rows), 2, 3), np.float32))
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:100], lambda content: b"", lambda content: content.replace(b"features", b"feature_")],
)
def test_a_damaged_file_is_computed_again(damage, tmp_path):
    backbone = Backbone()
    get_or_compute(tmp_path, DIGESTS, backbone)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(damage(file.read_bytes()))
    (tmp_path / ".leftover.npz.0.tmp").touch()
    check(get_or_compute(tmp_path, DIGESTS, backbone))
    assert backbone.computed == [*DIGESTS, *DIGESTS]
    check(get_or_compute(tmp_path, DIGESTS, backbone))
    assert [path.suffix for path in tmp_path.iterdir() if path.name != ".lock"] == [".npz"]


def test_a_full_disk_gives_a_warning_and_the_features(tiny_disk, caplog):
    digests = [sha256(f"image {row}".encode()).hexdigest() for row in range(3000)]
    check(get_or_compute(tiny_disk / "cache", digests, Backbone(digests)), digests)
    assert "not kept" in caplog.text
    assert not list(tiny_disk.rglob("*.npz"))


def test_parallel_folds_compute_each_image_once(tmp_path):
    backbone = Backbone()
    threads = [threading.Thread(target=get_or_compute, args=(tmp_path, DIGESTS, backbone)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backbone.computed == DIGESTS


def test_the_name_depends_on_every_fact():
    facts = {"weights": "a", "images": [(224, 224), [0.5]], "views": ["plain"]}
    names = {name_of(facts), *(name_of({**facts, key: "other"}) for key in facts)}
    assert len(names) == 1 + len(facts)
    assert name_of(dict(reversed(facts.items()))) == name_of(facts)


def test_a_fit_is_kept_for_its_inputs_only(tmp_path):
    calls = []

    def fit() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"weight": np.full((2, 3), len(calls), np.float32)}

    rows = np.arange(6.0)
    first = load_or_fit(tmp_path, [rows, np.array([1])], fit)
    again = load_or_fit(tmp_path, [rows.copy(), np.array([1])], fit)
    np.testing.assert_array_equal(first["weight"], again["weight"])
    assert len(calls) == 1
    for others in (
        [rows, np.array([2])],
        [rows.reshape(2, 3), np.array([1])],
        [rows.astype(np.float32), np.array([1])],
    ):
        load_or_fit(tmp_path, others, fit)
    load_or_fit(None, [rows, np.array([1])], fit)
    assert len(calls) == 5
