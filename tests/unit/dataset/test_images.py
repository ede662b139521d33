"""One preparation of pictures for training and serving (case C22 and more of its kind)."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_assets.dataset.images import (
    ImageError,
    ImageLimits,
    ImageTooLargeError,
    pixel_digest,
    prepare_image,
)
from cifar_assets.digests import sha256_bytes

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
SMOOTH = np.array(Image.fromarray(PIXELS[:4, :4]).resize((32, 32), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)


def with_alpha(pixels: np.ndarray, alpha: np.ndarray | int) -> np.ndarray:
    return np.dstack([pixels, np.broadcast_to(np.uint8(alpha), pixels.shape[:2])])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_keep_every_pixel(kind, options):
    prepared = prepare_image(encode(PIXELS, kind, **options))
    assert prepared.dtype == np.uint8
    assert prepared.flags.c_contiguous
    np.testing.assert_array_equal(prepared, chw(PIXELS))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_keep_what_pillow_decodes(kind):
    data = encode(SMOOTH, kind, quality=90)
    with Image.open(io.BytesIO(data)) as image:
        expected = chw(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(prepare_image(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_opaque_alpha_changes_nothing(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(prepare_image(encode(with_alpha(PIXELS, 255), kind, **options)), chw(PIXELS))


def test_palette_shows_its_colours():
    few = (PIXELS // 128 * 255).astype(np.uint8)
    palette = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    np.testing.assert_array_equal(prepare_image(encode(palette, "PNG")), chw(few))
    np.testing.assert_array_equal(prepare_image(encode(palette, "GIF")), chw(few))
    np.testing.assert_array_equal(prepare_image(encode(palette, "BMP")), chw(few))


def test_grey_is_three_equal_channels():
    grey = PIXELS[:, :, 0]
    for data in (encode(grey, "PNG"), encode(grey, "TIFF"), encode(np.dstack([grey, grey * 0 + 255]), "PNG")):
        np.testing.assert_array_equal(prepare_image(data), np.stack([grey] * 3))


def test_one_bit_is_black_and_white():
    bits = Image.fromarray((PIXELS[:, :, 0] > 127).astype(np.uint8) * 255).convert("1")
    expected = np.stack([np.where(PIXELS[:, :, 0] > 127, 255, 0).astype(np.uint8)] * 3)
    for kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(prepare_image(encode(bits, kind)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("scale", [256, 257])
def test_sixteen_bit_grey_keeps_the_high_byte(kind, scale):
    grey = PIXELS[:, :, 0]
    np.testing.assert_array_equal(prepare_image(encode(grey.astype(np.uint16) * scale, kind)), np.stack([grey] * 3))


def test_sixteen_bit_colour_keeps_the_high_byte():
    wide = PIXELS.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    np.testing.assert_array_equal(prepare_image(png(32, 32, depth=16, colour=2, rows=rows)), chw(PIXELS))


def test_sixteen_bit_grey_with_a_transparent_value_shows_the_background():
    grey = np.full((32, 32), 1000, dtype=">u2")
    grey[0, 0] = 40000
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    prepared = prepare_image(png(32, 32, depth=16, colour=0, rows=rows, extra=chunk(b"tRNS", struct.pack(">H", 40000))))
    assert (prepared[:, 0, 0] == 255).all()
    assert (prepared[:, 1, 1] == 1000 >> 8).all()


def test_cmyk_jpeg_shows_its_colours():
    prepared = prepare_image(encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(prepared.astype(int) - chw(SMOOTH)).mean() < 4


def test_colours_hidden_under_full_transparency_do_not_matter():
    alpha = np.where(np.arange(32)[:, None] + np.arange(32)[None] < 32, 0, 255).astype(np.uint8)
    other = np.where(alpha[:, :, None] == 0, 255 - PIXELS, PIXELS)
    first, second = (prepare_image(encode(with_alpha(pixels, alpha), "PNG")) for pixels in (PIXELS, other))
    np.testing.assert_array_equal(first, second)
    assert (first[:, 0, 0] == 255).all()
    np.testing.assert_array_equal(first[:, 31, 31], PIXELS[31, 31])


def test_colours_hidden_in_a_palette_do_not_matter():
    indices = (np.arange(1024) % 4).astype(np.uint8).reshape(32, 32)
    prepared = []
    for hidden in ((255, 0, 0), (0, 0, 255)):
        image = Image.fromarray(indices)
        image.putpalette([*hidden, 10, 20, 30, 40, 50, 60, 70, 80, 90])
        prepared.append(prepare_image(encode(image, "PNG", transparency=0)))
    np.testing.assert_array_equal(*prepared)
    assert (prepared[0][:, 0, 0] == 255).all()


def test_partly_transparent_pixels_mix_with_white():
    prepared = prepare_image(encode(with_alpha(np.zeros((32, 32, 3), np.uint8), 128), "PNG"))
    assert (prepared == 127).all()


def test_a_transparent_rgb_value_shows_the_background():
    pixels = PIXELS.copy()
    pixels[0, 0] = (1, 2, 3)
    prepared = prepare_image(encode(pixels, "PNG", transparency=(1, 2, 3)))
    assert (prepared[:, 0, 0] == 255).all()


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_an_animation_is_its_first_frame(kind, options):
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(prepare_image(data), prepare_image(encode(first, "PNG")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(orientation, kind):
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
def test_a_broken_exif_block_is_no_reason_to_refuse():
    data = encode(SMOOTH, "JPEG", quality=95)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    np.testing.assert_array_equal(prepare_image(broken), prepare_image(data))


@pytest.mark.parametrize("size", [(64, 64), (33, 32), (1, 1), (500, 20), (20, 500), (1024, 768)])
def test_other_sizes_are_cut_to_the_central_square_and_scaled(size):
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    picture[top : top + side, left : left + side] = (200, 100, 50)
    for kind in ("PNG", "JPEG"):
        prepared = prepare_image(encode(picture, kind))
        assert prepared.shape == (3, 32, 32)
        np.testing.assert_allclose(prepared[:, 8:24, 8:24].mean(axis=(1, 2)), (200, 100, 50), atol=3)


def test_without_resizing_other_sizes_are_refused():
    with pytest.raises(ImageError, match="32x32 image, got 64x64 pixels"):
        prepare_image(encode(np.zeros((64, 64, 3), np.uint8), "PNG"), resize=False)
    np.testing.assert_array_equal(prepare_image(encode(PIXELS, "PNG"), resize=False), chw(PIXELS))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "an empty file"),
        (b"hello, I am an image", "text"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\x00\x00\x00\x18ftypheic0000", "HEIC"),
        (b"\x00\x00\x00\x1cftypavif0000", "AVIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><p>404", "HTML"),
        (b"PK\x03\x04rest", "ZIP"),
        (b"P6 2 2 255 ", "Netpbm"),
        (b"8BPS0000", "Photoshop"),
        (b"\x00" * 50, "unknown kind"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"\xff\xd8\xff", "damaged JPEG"),
    ],
)
def test_what_is_no_picture_is_named(data, name):
    with pytest.raises(ImageError, match=name):
        prepare_image(data)


def test_formats_outside_the_list_are_refused():
    for kind, name in (("PPM", "Netpbm"), ("ICO", "ICO"), ("PCX", "unknown kind"), ("TGA", "unknown kind")):
        with pytest.raises(ImageError, match=f"PNG, JPEG, WebP, GIF, BMP or TIFF image, got .*{name}"):
            prepare_image(encode(PIXELS, kind))


def test_floating_point_samples_are_refused():
    with pytest.raises(ImageError, match="32-bit floating point"):
        prepare_image(encode(np.zeros((32, 32), np.float32), "TIFF"))
    with pytest.raises(ImageError, match="values from 0 to 70000"):
        prepare_image(encode(np.array([[0, 70000]] * 2, np.int32), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_cut_picture_is_refused(kind, kept):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, kind)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        prepare_image(data[: int(len(data) * kept)])


class TestLimits:
    """Decided from size and headers, so the pictures here have hardly any pixel data."""

    def test_bytes(self):
        with pytest.raises(ImageTooLargeError, match="at most 10 bytes, got 11 bytes"):
            prepare_image(b"x" * 11, limits=ImageLimits(max_bytes=10))

    @pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 1), (4097, 2048)])
    def test_pixels_of_a_png_that_has_none(self, size):
        with pytest.raises(ImageTooLargeError):
            prepare_image(png(*size, depth=8, colour=2, rows=b""))

    def test_pixels_of_other_formats(self):
        limits = ImageLimits(max_pixels=100, jpeg_factor=1)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
            with pytest.raises(ImageTooLargeError, match="at most 100 pixels, got 32x32 = 1024"):
                prepare_image(encode(PIXELS, kind), limits=limits)

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_frames(self, kind):
        frames = [Image.new("RGB", (32, 32), (10 * index, 0, 0)) for index in range(6)]
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert prepare_image(data, limits=ImageLimits(max_frames=6)).shape == (3, 32, 32)
        with pytest.raises(ImageTooLargeError, match="at most 5 frames"):
            prepare_image(data, limits=ImageLimits(max_frames=5))

    def test_blocks_of_a_gif(self):
        header = b"GIF89a" + struct.pack("<HHBBB", 32, 32, 0, 0, 0)
        with pytest.raises(ImageTooLargeError, match="data blocks"):
            prepare_image(header + b"\x21\xfe" + b"\x01a" * 200_000 + b"\0;")

    def test_scans_of_a_jpeg(self):
        data = encode(SMOOTH, "JPEG", progressive=True)
        start = data.index(b"\xff\xda")
        with pytest.raises(ImageTooLargeError, match="scans"):
            prepare_image(data[:start] + data[start:-2] * 200 + data[-2:])


def test_pixel_digest_is_the_sha256_of_the_stored_bytes():
    image = prepare_image(encode(PIXELS, "PNG"))
    assert pixel_digest(image) == sha256_bytes(chw(PIXELS).tobytes())
    assert pixel_digest(image) == pixel_digest(prepare_image(encode(PIXELS, "BMP")))
    with pytest.raises(ValueError, match="shape"):
        pixel_digest(image.transpose(1, 2, 0))


SEEDS = [encode(SMOOTH, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    kept=st.floats(0.2, 1),
)
def test_damaged_bytes_give_a_picture_or_an_image_error(seed, changes, kept):
    data = bytearray(seed[: max(1, int(len(seed) * kept))])
    for position, value in changes:
        data[int(position * len(data))] = value
    try:
        prepared = prepare_image(bytes(data))
    except ImageError:
        return
    assert prepared.shape == (3, 32, 32)
    assert prepared.dtype == np.uint8


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
