"""Decoding against Pillow's own conversions, and files that are no images."""

import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as v2

from fivefold.data import image_io
from fivefold.data.image_io import MAX_SCANS, DecodeOptions, decode, decoded_size, is_image, pixel_digest
from fivefold.errors import DataError
from fivefold.serving.workers import PIXEL_BYTES

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF"])
def test_pixels_are_as_pillow_reads_them(kind: str) -> None:
    content = encoded(Image.fromarray(RGB), kind)
    found = decode(content, "x")
    assert (found == np.array(Image.open(BytesIO(content)).convert("RGB"))).all()
    assert kind in ("JPEG", "WEBP", "GIF") or (found == RGB).all()
    assert (found.dtype, found.flags.writeable, found.flags.c_contiguous) == (np.uint8, True, True)


@pytest.mark.parametrize("pixels", [DecodeOptions(24), DecodeOptions(24, scaled=True)])
@pytest.mark.parametrize("size", [(96, 60), (60, 96), (47, 200), (24, 25), (20, 300), (24, 24)])
def test_an_image_is_stored_with_a_shorter_side_of_the_size_and_a_smaller_one_as_it_is(
    pixels: DecodeOptions, size: tuple[int, int]
) -> None:
    width, height = size
    content = encoded(Image.fromarray(RGB).resize(size), "JPEG", quality=95)
    found = pixels.decode(content, "x")
    scale = min(1, 24 / min(size))
    assert min(found.shape[:2]) == min(24, *size)
    assert found.shape[:2] == pytest.approx((height * scale, width * scale), abs=1.5 if pixels.scaled else 0.5)
    whole = decode(content, "x")
    if not pixels.scaled:
        resized = v2.resize(torch.from_numpy(whole).permute(2, 0, 1), found.shape[:2], antialias=True)
        assert (found == resized.permute(1, 2, 0).numpy()).all()
        assert found.shape[:2] == pixels.size(height, width)
    assert np.abs(found.astype(int) - pixels.resize(whole)[: found.shape[0], : found.shape[1]]).mean() < 12
    assert pixels.resize(found) is found, "what is shrunk stays"


def test_scaled_decoding_stops_above_the_size() -> None:
    content = encoded(Image.fromarray(RGB).resize((400, 300)), "JPEG")
    shorter = {
        least: min(decode(content, "x", min_size=least).shape[:2])
        for least in (0, 301, 300, 151, 150, 149, 75, 38, 37, 1)
    }
    assert shorter == {0: 300, 301: 300, 300: 300, 151: 300, 150: 150, 149: 150, 75: 75, 38: 75, 37: 38, 1: 38}


KINDS = [(kind, mode) for kind in ("PNG", "TIFF") for mode in ("RGB", "L", "RGBA", "I;16", "P")]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(("kind", "mode"), [*KINDS, ("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB"), ("WEBP", "RGBA")])
def test_images_are_upright_and_their_size_is_known_from_the_head(mode: str, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    image = wide if mode == "I;16" else Image.fromarray(RGB).convert(mode)
    content = encoded(image, kind, exif=exif)
    found = decode(content, "x")
    flat = Image.fromarray(decode(encoded(image, kind), "x"))
    flat.getexif()[0x0112] = orientation
    assert (found == np.array(ImageOps.exif_transpose(flat))).all()
    assert found.flags.c_contiguous
    assert decoded_size(content, "x") == found.shape[:2]
    with pytest.raises(DataError, match="x cannot be decoded"):
        decoded_size(content[:3], "x")


def test_grey_black_and_white_16_bits_and_cmyk() -> None:
    found = decode(encoded(Image.fromarray(np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16))), "x")
    assert found[0].tolist() == [[value] * found.shape[2] for value in (0, 0, 1, 1, 128, 255)]
    grey = RGB[..., 0]
    assert (decode(encoded(Image.fromarray(grey)), "x") == grey[..., None]).all()
    bits = Image.fromarray(grey).convert("1")
    assert (decode(encoded(bits), "x") == np.array(bits.convert("L"))[..., None]).all()
    content = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95)
    assert (decode(content, "x") == np.array(Image.open(BytesIO(content)).convert("RGB"))).all()


def test_transparency_is_laid_over_white() -> None:
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, 15:] = 255
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    expected = RGB.copy()
    expected[:, :15] = 255
    assert (decode(encoded(rgba), "x") == expected).all()
    grey_alpha = decode(encoded(rgba.convert("LA")), "x")
    assert (grey_alpha[:, :15] == 255).all()
    assert (grey_alpha[:, 15:] == np.array(Image.fromarray(RGB).convert("L"))[:, 15:, None]).all()


def test_a_palette_with_alpha() -> None:
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.frombytes("P", (2, 2), indices.tobytes())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    content = encoded(image, transparency=bytes([255, 0, 128]))
    assert decode(content, "x").tolist() == [[[255, 0, 0], [255] * 3], [[127, 127, 255], [255] * 3]]


def test_broken_metadata_neither_stops_nor_warns() -> None:
    broken = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff")
    palette = encoded(Image.fromarray(RGB).quantize(4), transparency=b"\0\1\2\3")
    reference = encoded(Image.fromarray(RGB), "JPEG")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(decode, [broken] * 20, ["x"] * 20):
            assert (found == decode(reference, "x")).all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(broken, "x")
        decode(palette, "x")
    assert not caught


def huge_png(side: int) -> bytes:
    """A PNG that says it has side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noted(kind: bytes, text: bytes, last: bool) -> bytes:
    """A PNG of the pixels RGB that lies on its side, with a chunk `kind` of `text` before or after its pixels."""
    head = {b"zTXt": b"note\0\0", b"iCCP": b"note\0\0", b"iTXt": b"note\0\1\0\0\0", b"tEXt": b"note\0"}[kind]
    body = kind + head + (text if kind == b"tEXt" else zlib.compress(text))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(RGB), exif=exif)
    at = len(content) - 12 if last else content.index(b"IDAT") - 4
    return content[:at] + chunk + content[at:]


@pytest.mark.parametrize("last", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt", b"tEXt"])
def test_long_texts_and_profiles_of_a_png_cost_neither_its_pixels_nor_memory(kind: bytes, last: bool) -> None:
    for size in (100, 2**26):
        content = noted(kind, bytes(size), last)
        tracemalloc.start()
        assert decoded_size(content, "x") == (30, 20)
        assert (decode(content, "x") == np.rot90(RGB, -1)).all()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * 2**20 + 2 * len(content)


def test_texts_that_are_short_alone_and_long_together_are_passed_over() -> None:
    content = noted(b"zTXt", bytes(10), last=False)
    at = content.index(b"zTXt") - 4
    whole = noted(b"zTXt", bytes(2**20 - 100), last=False)
    chunk = whole[at : at + 12 + int.from_bytes(whole[at : at + 4], "big")]
    assert (decode(content[:at] + 70 * chunk + content[at:], "x") == np.rot90(RGB, -1)).all()


def test_an_image_has_no_more_pixels_than_are_allowed() -> None:
    content = encoded(Image.fromarray(RGB))
    for read in (DecodeOptions(max_pixels=599).decode, DecodeOptions(max_pixels=599).stored_size, decode, decoded_size):
        with pytest.raises(DataError, match=r"more than the .* million allowed"):
            read(content if "Pixels" in read.__qualname__ else huge_png(11_000), "x")
    assert DecodeOptions(max_pixels=600).decode(content, "x").shape == RGB.shape
    assert DecodeOptions(max_pixels=600) == DecodeOptions(), "a cache made under another bound holds the same pixels"


JPEG = encoded(Image.fromarray(RGB.repeat(10, 0).repeat(10, 1)), "JPEG")
PNG = encoded(Image.fromarray(RGB), "PNG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], ""),
        (b"this is no image", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
        (b"", "the file is empty"),
        (huge_png(60_000), "decompression bomb"),
        (encoded(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["truncated jpeg", "truncated png", "text", "postscript", "empty", "bomb", "floats"],
)
def test_what_cannot_be_decoded_is_named_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jpg cannot be decoded: .*{reason}"):
        decode(content, "x.jpg")


def test_equal_pictures_have_equal_digests_whatever_their_files() -> None:
    png, bmp = (decode(encoded(Image.fromarray(RGB), kind), "x") for kind in ("PNG", "BMP"))
    assert pixel_digest(png) == pixel_digest(bmp)
    assert len(pixel_digest(png)) == 16
    assert pixel_digest(png) != pixel_digest(np.ascontiguousarray(png.reshape(30, 20, 3)))
    bmp[0, 0, 0] ^= 1
    assert pixel_digest(png) != pixel_digest(bmp)
    names = ["a.jpg", "b/C.JPEG", "x.y.png", "가.webp", "a.csv", "jpg", "a.jpg.txt", "Thumbs.db"]
    assert [is_image(name) for name in names] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P and alpha", "PA", "RGB", "RGBA", "I;16", "CMYK"])
def test_converting_by_bands_gives_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, options = Image.fromarray(np.dstack([RGB, RGB[..., :1]]), "RGBA"), {}
    if mode == "I;16":
        image = Image.fromarray(RGB[..., 0].astype(np.uint16) * 251)
    elif mode == "P and alpha":
        image, options = image.convert("RGB").quantize(7), {"transparency": bytes([0, 30, 60, 90, 255])}
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode) if mode in ("1", "P", "CMYK") else image.convert(mode)
    content = encoded(image, {"CMYK": "JPEG", "PA": "TIFF"}.get(mode, "PNG"), **options)
    whole = decode(content, "x")
    for band in (1, 31, 95):
        monkeypatch.setattr(image_io, "CHUNK_PIXELS", band)
        assert (decode(content, "x") == whole).all()
    with Image.open(BytesIO(content)) as opened:
        rgba = opened.convert("RGBA")
    expected = np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    assert mode == "I;16" or (whole == expected).all()


def scanned(scans: int, width: int = 64, height: int = 48) -> bytes:
    """A progressive JPEG with so many scans beside its own that say nothing."""
    own = encoded(Image.new("RGB", (width, height), "grey"), "JPEG", progressive=True)
    return own[:-2] + own[own.rindex(b"\xff\xc4") : -2] * scans + own[-2:]


def test_a_jpeg_of_a_great_many_scans_is_refused_by_its_head() -> None:
    assert (decode(scanned(MAX_SCANS // 2), "x") == decode(scanned(0), "x")).all()
    for scans in (MAX_SCANS, 100_000):
        begun = time.monotonic()
        for read in (decode, decoded_size):
            with pytest.raises(DataError, match="more than 100 scans"):
                read(scanned(scans), "x")
        assert time.monotonic() - begun < 1


def test_what_only_looks_like_scans_is_not_counted() -> None:
    marks = b"\xff\xda" * 2 * MAX_SCANS
    for content in (JPEG + marks, JPEG[:2] + b"\xff\xe5" + struct.pack(">H", len(marks) + 2) + marks + JPEG[2:]):
        assert (decode(content, "x") == decode(JPEG, "x")).all()
    # fill bytes before a marker, and one without a length, hide no scan
    hidden = scanned(0)[:-2] + (b"\xff\xff\xff\xd0" + scanned(0)[scanned(0).rindex(b"\xff\xc4") : -2]) * 2 * MAX_SCANS
    with pytest.raises(DataError, match="more than 100 scans"):
        decode(hidden + b"\xff\xd9", "x")


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}, {"quality": 10}])
def test_the_size_of_a_webp_is_checked_before_there_is_room_for_it(options: dict[str, object]) -> None:
    content = encoded(Image.fromarray(RGB), "WEBP", **options)
    assert decode(content, "x", max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(DataError, match="30 × 20 pixels"):
        decode(content, "x", max_pixels=599)
    huge = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * b"\xfe\x3f\0"
    with pytest.raises(DataError, match="16383 × 16383 pixels, more than the 1 million"):
        decode(b"RIFF" + struct.pack("<I", 4 + len(huge)) + b"WEBP" + huge, "x", max_pixels=1e6)


def test_other_formats_than_those_allowed_are_refused() -> None:
    content = encoded(Image.fromarray(RGB), "GIF")
    assert decode(content, "x").shape == (20, 30, 3)
    assert decode(PNG, "x", formats=["JPEG", "PNG"]).shape == (20, 30, 3)
    with pytest.raises(DataError, match="no image of a known format, JPEG, PNG"):
        decode(content, "x", formats=["JPEG", "PNG"])


HEAVY = {
    "a palette with alpha": ("P", "PNG", {"transparency": b"\0\x80"}),
    "alpha": ("RGBA", "PNG", {}),
    "16 bits": ("I;16", "PNG", {}),
    "turned": ("RGB", "JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    "progressive": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "progressive CMYK": ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
    "lossy": ("RGBA", "WEBP", {}),
    "lossless": ("RGBA", "WEBP", {"lossless": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind", "options"), HEAVY.values(), ids=HEAVY)
def test_decoding_takes_no_more_memory_than_a_server_counts(mode: str, kind: str, options: dict, tmp_path) -> None:
    side = 4000
    (tmp_path / "image").write_bytes(encoded(Image.new(mode, (side, side)), kind, **options))
    code = (
        "import sys; from pathlib import Path; from fivefold.data.image_io import decode\n"
        "content, own = Path(sys.argv[1]).read_bytes(), Path('/proc/self/status')\n"
        "peak = lambda: int(own.read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak(); decode(content, 'x'); print(1024 * (peak() - before))"
    )
    command = [sys.executable, "-c", code, tmp_path / "image"]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / side**2
    print(f"{taken:.1f} bytes a pixel")
    assert 4 < taken <= PIXEL_BYTES
