"""The preparation of pictures, which training and serving share."""

import io
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cifar_assets.dataset.formats.images import (
    ImageError,
    ImageLimits,
    ImageTooLargeError,
    open_picture,
    picture_pixels,
    pixel_digest,
)
from cifar_assets.dataset.formats.images import prepare_image as prepare_image_of_size
from resources.digests import sha256_bytes

prepare_image = partial(prepare_image_of_size, size=32)

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
SMOOTH = np.array(Image.fromarray(PIXELS[:4, :4]).resize((32, 32), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG assembled by hand, for variants that Pillow cannot write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)


def with_alpha(pixels: np.ndarray, alpha: np.ndarray | int) -> np.ndarray:
    return np.dstack([pixels, np.broadcast_to(np.uint8(alpha), pixels.shape[:2])])


def test_png_keeps_every_pixel() -> None:
    prepared = prepare_image(encode(PIXELS, "PNG"))
    assert prepared.dtype == np.uint8
    assert prepared.flags.c_contiguous
    np.testing.assert_array_equal(prepared, chw(PIXELS))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": "x" * 1000}])
def test_jpeg_keeps_what_pillow_decodes(options) -> None:
    data = encode(SMOOTH, "JPEG", quality=90, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = chw(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(prepare_image(data), expected)


def test_opaque_alpha_changes_nothing() -> None:
    np.testing.assert_array_equal(prepare_image(encode(with_alpha(PIXELS, 255), "PNG")), chw(PIXELS))


def test_palette_shows_its_colors() -> None:
    few = (PIXELS // 128 * 255).astype(np.uint8)
    palette = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    np.testing.assert_array_equal(prepare_image(encode(palette, "PNG")), chw(few))


@pytest.mark.parametrize("palette", [b"", chunk(b"PLTE", bytes(6))])
def test_pixel_outside_the_palette_is_refused(palette) -> None:
    rows = b"\0\0\1\2\3" * 4
    with pytest.raises(ImageError, match="palette"):
        prepare_image(png(4, 4, depth=8, color=3, rows=rows, extra=palette))


def test_gray_is_three_equal_channels() -> None:
    gray = PIXELS[:, :, 0]
    for data in (encode(gray, "PNG"), encode(np.dstack([gray, gray * 0 + 255]), "PNG")):
        np.testing.assert_array_equal(prepare_image(data), np.stack([gray] * 3))


def test_one_bit_is_black_and_white() -> None:
    bits = Image.fromarray((PIXELS[:, :, 0] > 127).astype(np.uint8) * 255).convert("1")
    expected = np.stack([np.where(PIXELS[:, :, 0] > 127, 255, 0).astype(np.uint8)] * 3)
    np.testing.assert_array_equal(prepare_image(encode(bits, "PNG")), expected)


@pytest.mark.parametrize("transparent", [None, 0, 1, 3])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gray_below_eight_bits_is_read_exactly(depth: int, transparent: int | None) -> None:
    top = 2**depth - 1
    values = np.arange(32 * 32).reshape(32, 32) % (top + 1)
    bits = ((values[:, :, None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits.reshape(32, -1), axis=1))
    extra = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    expected = np.where(values == (-1 if transparent is None else transparent & top), 255, values * 255 // top)
    data = png(32, 32, depth=depth, color=0, rows=rows, extra=extra)
    np.testing.assert_array_equal(prepare_image(data), np.stack([expected] * 3))


@pytest.mark.parametrize("scale", [256, 257])
def test_sixteen_bit_gray_keeps_the_high_byte(scale) -> None:
    gray = PIXELS[:, :, 0]
    np.testing.assert_array_equal(prepare_image(encode(gray.astype(np.uint16) * scale, "PNG")), np.stack([gray] * 3))


def test_sixteen_bit_color_keeps_the_high_byte() -> None:
    wide = PIXELS.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    np.testing.assert_array_equal(prepare_image(png(32, 32, depth=16, color=2, rows=rows)), chw(PIXELS))


def test_sixteen_bit_gray_with_a_transparent_value_shows_the_background() -> None:
    gray = np.full((32, 32), 1000, dtype=">u2")
    gray[0, 0] = 40000
    rows = b"".join(b"\0" + row.tobytes() for row in gray)
    prepared = prepare_image(png(32, 32, depth=16, color=0, rows=rows, extra=chunk(b"tRNS", struct.pack(">H", 40000))))
    assert (prepared[:, 0, 0] == 255).all()
    assert (prepared[:, 1, 1] == 1000 >> 8).all()


def test_sixteen_bit_transparent_color_is_refused() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS.astype(">u2") * 257)
    with pytest.raises(ImageError, match="a transparent color of 16-bit samples"):
        prepare_image(png(32, 32, depth=16, color=2, rows=rows, extra=chunk(b"tRNS", bytes(6))))


def test_jpeg_samples_that_are_not_read_exactly_are_refused() -> None:
    with pytest.raises(ImageError, match="got a CMYK one"):
        prepare_image(encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"))
    data = bytearray(encode(SMOOTH, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ImageError, match="got one with 12-bit samples"):
        prepare_image(bytes(data))


def test_colors_under_full_transparency_do_not_matter() -> None:
    alpha = np.where(np.arange(32)[:, None] + np.arange(32)[None] < 32, 0, 255).astype(np.uint8)
    other = np.where(alpha[:, :, None] == 0, 255 - PIXELS, PIXELS)
    first, second = (prepare_image(encode(with_alpha(pixels, alpha), "PNG")) for pixels in (PIXELS, other))
    np.testing.assert_array_equal(first, second)
    assert (first[:, 0, 0] == 255).all()
    np.testing.assert_array_equal(first[:, 31, 31], PIXELS[31, 31])


def test_transparent_palette_colors_do_not_matter() -> None:
    indices = (np.arange(1024) % 4).astype(np.uint8).reshape(32, 32)
    prepared = []
    for hidden in ((255, 0, 0), (0, 0, 255)):
        image = Image.fromarray(indices)
        image.putpalette([*hidden, 10, 20, 30, 40, 50, 60, 70, 80, 90])
        prepared.append(prepare_image(encode(image, "PNG", transparency=0)))
    np.testing.assert_array_equal(*prepared)
    assert (prepared[0][:, 0, 0] == 255).all()


def test_partly_transparent_pixels_mix_with_white() -> None:
    prepared = prepare_image(encode(with_alpha(np.zeros((32, 32, 3), np.uint8), 128), "PNG"))
    assert (prepared == 127).all()


def test_a_transparent_rgb_value_shows_the_background() -> None:
    pixels = PIXELS.copy()
    pixels[0, 0] = (1, 2, 3)
    prepared = prepare_image(encode(pixels, "PNG", transparency=(1, 2, 3)))
    assert (prepared[:, 0, 0] == 255).all()


def test_animated_png_is_its_default_image() -> None:
    first, second = (Image.new("RGB", (32, 32), color) for color in ((255, 0, 0), (0, 0, 255)))
    data = encode(first, "PNG", save_all=True, append_images=[second])
    np.testing.assert_array_equal(prepare_image(data), prepare_image(encode(first, "PNG")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(orientation, kind) -> None:
    quarters = np.zeros((32, 32, 3), np.uint8)
    quarters[:16, :16] = (250, 10, 10)
    quarters[16:, :16] = (10, 250, 10)
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image = Image.fromarray(quarters)
    stored = image if orientation == 1 else image.transpose(methods[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    prepared = prepare_image(encode(stored, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {})))
    assert np.abs(prepared.astype(int) - chw(quarters)).mean() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_block_is_ignored() -> None:
    data = encode(SMOOTH, "JPEG", quality=95)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    np.testing.assert_array_equal(prepare_image(broken), prepare_image(data))


def rational_tags(num_tags: int) -> bytes:
    """An EXIF block of 18 bytes for each tag: a rotation, then fractions."""
    tags = [struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)]
    tags += [struct.pack(">HHII", 0x9000 + i, 5, 1, 10 + 12 * num_tags) for i in range(1, num_tags)]
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", num_tags) + b"".join(tags) + bytes(6 * num_tags + 16)


def test_only_the_rotation_of_exif_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = ImageFileDirectory_v2.__getitem__
    monkeypatch.setattr(ImageFileDirectory_v2, "__getitem__", lambda ifd, tag: read.append(tag) or original(ifd, tag))
    plain = encode(PIXELS, "PNG")
    with_tags = plain[:33] + chunk(b"eXIf", rational_tags(3000)) + plain[33:]
    np.testing.assert_array_equal(prepare_image(with_tags), chw(np.rot90(PIXELS, -1)))
    assert set(read) == {0x0112}


@pytest.mark.parametrize("num_bytes", [(64 << 10) + 1, 9 << 20])
def test_png_exif_longer_than_a_jpeg_can_hold_is_left_out(num_bytes: int) -> None:
    plain = encode(PIXELS, "PNG")
    exif = rational_tags(3000)
    long = plain[:33] + chunk(b"eXIf", exif + bytes(num_bytes - len(exif))) + plain[33:]
    assert open_picture(long).essence == open_picture(plain).essence
    np.testing.assert_array_equal(prepare_image(long), chw(PIXELS))


def test_memory_error_while_reading_exif_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(exif: Image.Exif, data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Exif, "load", fail)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PIXELS, "PNG", exif=exif.tobytes())
    with pytest.raises(MemoryError):
        prepare_image(data)


@pytest.mark.parametrize("size", [(64, 64), (33, 32), (1, 1), (500, 20), (20, 500), (1024, 768)])
def test_other_sizes_are_cut_to_the_central_square_and_scaled(size) -> None:
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    picture[top : top + side, left : left + side] = (200, 100, 50)
    for kind in ("PNG", "JPEG"):
        prepared = prepare_image(encode(picture, kind))
        assert prepared.shape == (3, 32, 32)
        np.testing.assert_allclose(prepared[:, 8:24, 8:24].mean(axis=(1, 2)), (200, 100, 50), atol=3)


def test_without_resizing_other_sizes_are_refused() -> None:
    with pytest.raises(ImageError, match="32x32 image, got 64x64 pixels"):
        prepare_image(encode(np.zeros((64, 64, 3), np.uint8), "PNG"), resize=False)
    np.testing.assert_array_equal(prepare_image(encode(PIXELS, "PNG"), resize=False), chw(PIXELS))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "an empty file"),
        (b"hello, I am an image", "unknown kind"),
        (b"\x00\x00\x00\x18ftypheic0000", "HEIC"),
        (b"\x00\x00\x00\x1cftypavif0000", "AVIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><p>404", "HTML"),
        (b"\x00" * 50, "unknown kind"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"\xff\xd8\xff", "damaged JPEG"),
    ],
)
def test_file_of_another_kind_is_named(data, name) -> None:
    with pytest.raises(ImageError, match=name):
        prepare_image(data)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("WEBP", "WebP"), ("GIF", "GIF"), ("BMP", "BMP"), ("TIFF", "TIFF"), ("PPM", "unknown kind")],
)
def test_other_formats_are_refused_by_name(kind, name) -> None:
    with pytest.raises(ImageError, match=f"Expected a PNG or JPEG image, got an? .*{name}"):
        prepare_image(encode(PIXELS, kind))


def test_pillow_gets_only_what_pixels_and_rotation_depend_on() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngInfo()
    text.add_text("comment", "x" * 5000)
    plain = encode(SMOOTH, "JPEG", exif=exif)
    assert len(
        open_picture(encode(SMOOTH, "JPEG", exif=exif, comment="x" * 5000, icc_profile=b"x" * 100_000)).essence
    ) <= (len(plain))
    png_data = encode(PIXELS, "PNG", exif=exif, pnginfo=text, icc_profile=b"x" * 5000)
    assert len(open_picture(png_data).essence) <= len(encode(PIXELS, "PNG", exif=exif))
    np.testing.assert_array_equal(prepare_image(png_data), chw(np.rot90(PIXELS, -1)))


def test_file_with_two_sizes_is_refused() -> None:
    data = encode(PIXELS, "PNG")
    header = data[8:33]
    with pytest.raises(ImageError, match="two IHDR chunks"):
        prepare_image(data[:33] + header + data[33:])
    jpeg = encode(SMOOTH, "JPEG")
    start = jpeg.index(b"\xff\xc0")
    with pytest.raises(ImageError, match="two frames"):
        prepare_image(jpeg[:start] + jpeg[start : start + 19] + jpeg[start:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_cut_picture_is_refused(kind, kept) -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, kind)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        prepare_image(data[: int(len(data) * kept)])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("pixels", [SMOOTH, SMOOTH[..., 0]], ids=["color", "gray"])
def test_the_short_way_to_decode_a_jpeg_gives_the_same_pixels(pixels, options) -> None:
    picture = open_picture(encode(Image.fromarray(pixels).resize((32, 32)), "JPEG", **options))
    assert picture.mode
    np.testing.assert_array_equal(picture_pixels(picture, 32), picture_pixels(replace(picture, mode=""), 32))
    with pytest.raises(ImageError, match="truncated"):
        picture_pixels(replace(picture, essence=picture.essence[:-30]), 32)


class TestLimits:
    """Decided from size and headers, so the pictures here have hardly any pixel data."""

    def test_bytes(self) -> None:
        with pytest.raises(ImageTooLargeError, match="at most 10 bytes, got 11 bytes"):
            prepare_image(b"x" * 11, limits=ImageLimits(max_bytes=10))

    @pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 1), (4097, 2048)])
    def test_pixels_of_a_png_that_has_none(self, size) -> None:
        with pytest.raises(ImageTooLargeError):
            prepare_image(png(*size, depth=8, color=2, rows=b""))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_pixels_and_sides(self, kind) -> None:
        with pytest.raises(ImageTooLargeError, match=r"at most (100|200) pixels and 16384 on a side, got 32x32"):
            prepare_image(encode(PIXELS, kind), limits=ImageLimits(max_pixels=100))
        with pytest.raises(ImageTooLargeError, match="31 on a side, got 32x32"):
            prepare_image(encode(PIXELS, kind), limits=ImageLimits(max_side=31))

    def test_parts(self) -> None:
        picture = encode(PIXELS, "PNG")
        with pytest.raises(ImageTooLargeError, match="4096 chunks"):
            prepare_image(picture[:33] + chunk(b"tEXt", b"a\0") * 500_000 + picture[33:])
        jpeg = encode(SMOOTH, "JPEG")
        for part in (b"\xff\xfe\0\2", b"\xff", b"\xff\0"):
            with pytest.raises(ImageTooLargeError, match="4096 segments"):
                prepare_image(jpeg[:2] + part * 2_000_000 + jpeg[2:])

    @pytest.mark.parametrize("kind", ["RGBA PNG of 16-bit samples", "progressive JPEG"])
    def test_memory_of_the_largest_picture(self, kind) -> None:
        if kind == "progressive JPEG":
            data = encode(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True, subsampling=0)
        else:
            data = png(4096, 2048, depth=16, color=6, rows=bytes(2048 * (1 + 8 * 4096)))
        code = (
            "import pathlib, resource, sys\n"
            "from cifar_assets.dataset.formats.images import prepare_image\n"
            "used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20),) * 2)\n"
            "print(prepare_image(sys.stdin.buffer.read(), 32).shape)"
        )
        run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
        assert run.stdout == b"(3, 32, 32)\n", run.stderr.decode()

    def test_scans_of_a_jpeg(self) -> None:
        data = encode(SMOOTH, "JPEG", progressive=True)
        start = data.index(b"\xff\xda")
        with pytest.raises(ImageTooLargeError, match="scans"):
            prepare_image(data[:start] + data[start:-2] * 200 + data[-2:])


def test_pixel_digest_is_the_sha256_of_the_stored_bytes() -> None:
    image = prepare_image(encode(PIXELS, "PNG"))
    assert pixel_digest(image) == sha256_bytes(chw(PIXELS).tobytes())
    with pytest.raises(ValueError, match="shape"):
        pixel_digest(image.transpose(1, 2, 0))
