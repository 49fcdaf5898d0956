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


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF"])
def test_decoded_pixels_equal_those_of_pillow(kind):
    content = encode(Image.fromarray(RGB), kind)
    pixels = decode(content, "x")
    assert (pixels == np.array(Image.open(BytesIO(content)).convert("RGB"))).all()
    assert kind in ("JPEG", "WEBP", "GIF") or (pixels == RGB).all()
    assert (pixels.dtype, pixels.flags.writeable, pixels.flags.c_contiguous) == (np.uint8, True, True)


@pytest.mark.parametrize("pixels", [DecodeOptions(24), DecodeOptions(24, scaled=True)])
@pytest.mark.parametrize("size", [(96, 60), (47, 200), (24, 25), (20, 300)])
def test_images_are_resized_to_the_shorter_side_and_smaller_images_are_kept(pixels, size):
    width, height = size
    content = encode(Image.fromarray(RGB).resize(size), "JPEG", quality=95)
    stored = pixels.decode(content, "x")
    scale = min(1, 24 / min(size))
    assert min(stored.shape[:2]) == min(24, *size)
    assert stored.shape[:2] == pytest.approx((height * scale, width * scale), abs=1.5 if pixels.scaled else 0.5)
    original = decode(content, "x")
    if not pixels.scaled:
        resized = v2.resize(torch.from_numpy(original).permute(2, 0, 1), stored.shape[:2], antialias=True)
        assert (stored == resized.permute(1, 2, 0).numpy()).all()
    assert np.abs(stored.astype(int) - pixels.resize(original)[: stored.shape[0], : stored.shape[1]]).mean() < 12
    assert pixels.resize(stored) is stored, "a resized image must not be resized again"


def test_scaled_decoding_never_goes_below_the_minimum_size():
    content = encode(Image.fromarray(RGB).resize((400, 300)), "JPEG")
    expected = {0: 300, 301: 300, 151: 300, 150: 150, 75: 75, 38: 75, 37: 38, 1: 38}
    assert {least: min(decode(content, "x", min_size=least).shape[:2]) for least in expected} == expected


KINDS = [(kind, mode) for kind in ("PNG", "TIFF") for mode in ("RGB", "L", "RGBA", "I;16", "P")]


@pytest.mark.parametrize(("kind", "mode"), [*KINDS, ("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB"), ("WEBP", "RGBA")])
def test_images_are_rotated_upright_and_decoded_size_equals_their_shape(mode, kind):
    wide = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    image = wide if mode == "I;16" else Image.fromarray(RGB).convert(mode)
    for orientation in (0, 2, 6, 7, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode(image, kind, exif=exif)
        pixels = decode(content, "x")
        flat = Image.fromarray(decode(encode(image, kind), "x"))
        flat.getexif()[0x0112] = orientation
        assert (pixels == np.array(ImageOps.exif_transpose(flat))).all()
        assert decoded_size(content, "x") == pixels.shape[:2]


def test_grey_16_bit_black_and_white_and_cmyk_images_are_decoded():
    pixels = decode(encode(Image.fromarray(np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16))), "x")
    assert pixels[0].tolist() == [[value] * pixels.shape[2] for value in (0, 0, 1, 1, 128, 255)]
    grey = RGB[..., 0]
    assert (decode(encode(Image.fromarray(grey)), "x") == grey[..., None]).all()
    bits = Image.fromarray(grey).convert("1")
    assert (decode(encode(bits), "x") == np.array(bits.convert("L"))[..., None]).all()
    content = encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95)
    assert (decode(content, "x") == np.array(Image.open(BytesIO(content)).convert("RGB"))).all()


def test_broken_metadata_causes_no_error_and_no_warning():
    broken = encode(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff")
    palette = encode(Image.fromarray(RGB).quantize(4), transparency=b"\0\1\2\3")
    reference = encode(Image.fromarray(RGB), "JPEG")
    with ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(decode, [broken] * 20, ["x"] * 20):
            assert (pixels == decode(reference, "x")).all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(broken, "x")
        decode(palette, "x")
    assert not caught


def make_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def make_png_header_of_size(side: int) -> bytes:
    """Return a PNG whose header declares side x side pixels."""
    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + make_chunk(b"IDAT", zlib.compress(b"")) + make_chunk(b"IEND", b"")


def make_png_with_text(kind: bytes, text: bytes) -> bytes:
    """Return a PNG of the pixels RGB, rotated by EXIF, with a chunk `kind` of `text` before and after its pixels."""
    head = {b"zTXt": b"note\0\0", b"iCCP": b"note\0\0", b"iTXt": b"note\0\1\0\0\0", b"tEXt": b"note\0"}[kind]
    chunk = make_chunk(kind, head + (text if kind == b"tEXt" else zlib.compress(text, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.fromarray(RGB), exif=exif)
    position = content.index(b"IDAT") - 4
    return content[:position] + chunk + content[position:-12] + chunk + content[-12:]


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt", b"tEXt"])
def test_long_png_texts_and_profiles_neither_change_pixels_nor_use_memory(kind):
    for size in (100, 2**25):
        content = make_png_with_text(kind, bytes(size))
        tracemalloc.start()
        assert decoded_size(content, "x") == (30, 20)
        assert (decode(content, "x") == np.rot90(RGB, -1)).all()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * 2**20 + 2 * len(content)


def test_many_short_png_texts_are_ignored():
    content = make_png_with_text(b"zTXt", bytes(10))
    position = content.index(b"zTXt") - 4
    chunk = make_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2**20 - 100)))
    assert (decode(content[:position] + 70 * chunk + content[position:], "x") == np.rot90(RGB, -1)).all()


def test_images_with_too_many_pixels_are_rejected():
    content = encode(Image.fromarray(RGB))
    for read in (DecodeOptions(max_pixels=599).decode, DecodeOptions(max_pixels=599).stored_size, decode, decoded_size):
        with pytest.raises(DataError, match=r"more than the .* million allowed"):
            read(content if "Pixels" in read.__qualname__ else make_png_header_of_size(11_000), "x")
    assert DecodeOptions(max_pixels=600).decode(content, "x").shape == RGB.shape
    assert DecodeOptions(max_pixels=600) == DecodeOptions(), "caches built with another max_pixels hold the same pixels"


JPEG = encode(Image.fromarray(RGB.repeat(10, 0).repeat(10, 1)), "JPEG")
PNG = encode(Image.fromarray(RGB), "PNG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], ""),
        (b"this is no image", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
        (b"", "the file is empty"),
        (make_png_header_of_size(60_000), "decompression bomb"),
        (encode(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["truncated jpeg", "truncated png", "text", "postscript", "empty", "bomb", "floats"],
)
def test_undecodable_file_is_named_with_the_reason(content, reason):
    with pytest.raises(DataError, match=rf"x\.jpg cannot be decoded: .*{reason}"):
        decode(content, "x.jpg")


def test_equal_images_have_equal_digests_in_any_file_format():
    png, bmp = (decode(encode(Image.fromarray(RGB), kind), "x") for kind in ("PNG", "BMP"))
    assert pixel_digest(png) == pixel_digest(bmp)
    assert pixel_digest(png) != pixel_digest(np.ascontiguousarray(png.reshape(30, 20, 3)))
    bmp[0, 0, 0] ^= 1
    assert pixel_digest(png) != pixel_digest(bmp)
    names = ["b/C.JPEG", "x.y.png", "가.webp", "a.csv", "jpg", "a.jpg.txt"]
    assert [is_image(name) for name in names] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P and alpha", "PA", "RGB", "RGBA", "I;16", "CMYK"])
def test_conversion_in_bands_equals_conversion_of_the_whole_image(mode, monkeypatch):
    image, options = Image.fromarray(np.dstack([RGB, RGB[..., :1]]), "RGBA"), {}
    if mode == "I;16":
        image = Image.fromarray(RGB[..., 0].astype(np.uint16) * 251)
    elif mode == "P and alpha":
        image, options = image.convert("RGB").quantize(7), {"transparency": bytes([0, 30, 60, 90, 255])}
    else:
        image = image.convert("RGB").convert(mode) if mode in ("1", "P", "CMYK") else image.convert(mode)
    content = encode(image, {"CMYK": "JPEG", "PA": "TIFF"}.get(mode, "PNG"), **options)
    unbanded = decode(content, "x")
    for band in (1, 31, 95):
        monkeypatch.setattr(image_io, "CHUNK_PIXELS", band)
        assert (decode(content, "x") == unbanded).all()
    with Image.open(BytesIO(content)) as opened:
        rgba = opened.convert("RGBA")
    expected = np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    assert mode == "I;16" or (unbanded == expected).all()


def make_jpeg(scans: int) -> bytes:
    """Return a progressive JPEG with `scans` additional empty scans."""
    jpeg = encode(Image.new("RGB", (64, 48), "grey"), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xc4") : -2] * scans + jpeg[-2:]


def test_jpeg_with_too_many_scans_is_rejected_before_decoding():
    assert (decode(make_jpeg(MAX_SCANS // 2), "x") == decode(make_jpeg(0), "x")).all()
    for scans in (MAX_SCANS, 100_000):
        start = time.monotonic()
        for read in (decode, decoded_size):
            with pytest.raises(DataError, match="more than 100 scans"):
                read(make_jpeg(scans), "x")
        assert time.monotonic() - start < 1


def test_only_real_jpeg_scans_are_counted():
    marks = b"\xff\xda" * 2 * MAX_SCANS
    for content in (JPEG + marks, JPEG[:2] + b"\xff\xe5" + struct.pack(">H", len(marks) + 2) + marks + JPEG[2:]):
        assert (decode(content, "x") == decode(JPEG, "x")).all()
    # Fill bytes before a marker, and a marker without a length, hide no scan.
    plain = make_jpeg(0)
    scans = (b"\xff\xff\xff\xd0" + plain[plain.rindex(b"\xff\xc4") : -2]) * 2 * MAX_SCANS
    with pytest.raises(DataError, match="more than 100 scans"):
        decode(plain[:-2] + scans + b"\xff\xd9", "x")


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}, {"quality": 10}])
def test_webp_size_is_checked_before_memory_is_allocated(options):
    content = encode(Image.fromarray(RGB), "WEBP", **options)
    assert decode(content, "x", max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(DataError, match="30 × 20 pixels"):
        decode(content, "x", max_pixels=599)
    huge = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * b"\xfe\x3f\0"
    with pytest.raises(DataError, match="16383 × 16383 pixels, more than the 1 million"):
        decode(b"RIFF" + struct.pack("<I", 4 + len(huge)) + b"WEBP" + huge, "x", max_pixels=1e6)


def test_formats_that_are_not_allowed_are_rejected():
    assert decode(PNG, "x", formats=["JPEG", "PNG"]).shape == (20, 30, 3)
    with pytest.raises(DataError, match="no image of a known format, JPEG, PNG"):
        decode(encode(Image.fromarray(RGB), "GIF"), "x", formats=["JPEG", "PNG"])


MEMORY_CASES = {
    "a palette with alpha": ("P", "PNG", {"transparency": b"\0\x80"}),
    "turned": ("RGB", "JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    "progressive CMYK": ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
    "lossless": ("RGBA", "WEBP", {"lossless": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind", "options"), MEMORY_CASES.values(), ids=MEMORY_CASES)
def test_decoding_stays_within_the_memory_limit_of_the_server(mode, kind, options, tmp_path):
    side = 4000
    (tmp_path / "image").write_bytes(encode(Image.new(mode, (side, side)), kind, **options))
    code = (
        "import sys; from pathlib import Path; from fivefold.data.image_io import decode\n"
        "content, own = Path(sys.argv[1]).read_bytes(), Path('/proc/self/status')\n"
        "peak = lambda: int(own.read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak(); decode(content, 'x'); print(1024 * (peak() - before))"
    )
    command = [sys.executable, "-c", code, tmp_path / "image"]
    bytes_per_pixel = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / side**2
    assert 4 < bytes_per_pixel <= PIXEL_BYTES
