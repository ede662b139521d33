"""Decodes picture bytes to the square of pixels that a model sees, for stored data and for requests alike.

Accepted: JPEG and PNG, under any name or content type. Every other format is refused, and so are samples that cannot be
read exactly: CMYK and 12-bit JPEG, and a transparent color in a 16-bit RGB PNG. Of an animated PNG, the default image
counts. EXIF rotation is applied. Transparent parts become white. 16-bit samples keep their high byte. Color profiles
are ignored. A picture of another size is cropped to its central square, or padded to a square with black, and scaled
with an antialiased bicubic filter; one of the right size keeps the pixels that Pillow decodes.

Pillow gets only the parts of the file that the pixels and the rotation depend on. Texts, profiles and previews
therefore cost nothing, and Pillow and its decoders cannot disagree about a file's size.
"""

import io
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_assets.contracts import Fit
from resources.digests import sha256_bytes
from resources.errors import DataError

_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_FACTOR = 2
_DRAFT_SIDE = 256
"""A JPEG is decoded at no smaller a scale than one of this width and height, or four times those of the result."""
_MAX_PARTS = 4096
"""Chunks of a PNG, segments of a JPEG."""
_MAX_SCANS = 32
"""Passes over the pixels of a progressive JPEG."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
_PNG_GRAY, _PNG_RGB = 0, 2
_PNG_MAX_EXIF = 64 << 10
"""The maximum length of a JPEG's profile. A longer one is dropped."""

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_START_OF_SCAN = 0xDA
_JPEG_WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xD9), 0xFF)
_JPEG_FRAMES = {*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
_JPEG_KEPT = _JPEG_FRAMES | {0xC4, 0xCC, 0xDB, 0xDD}  # and tables
_JPEG_APPLICATION = {0xE0: b"JFIF\0", 0xE1: b"Exif\0\0", 0xEE: b"Adobe"}
"""Segments that define colors and rotation; the first of each kind counts."""

_KINDS = (
    (0, _PNG_SIGNATURE, "a truncated or damaged PNG file"),
    (0, _JPEG_SIGNATURE, "a truncated or damaged JPEG file"),
    (8, b"WEBP", "a WebP image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"BM", "a BMP image"),
    (0, b"II", "a TIFF image"),
    (0, b"MM", "a TIFF image"),
    (4, b"ftyp", "a HEIC or AVIF image"),
    (0, b"<", "an HTML, SVG or XML document"),
)
"""Signatures of other file formats, and their offsets."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits for one picture, checked on its bytes before any pixel is decoded.

    The default ones keep the memory of one decoding below about 150 MB and its time below one second.
    """

    max_bytes: int = 10 * 1024 * 1024
    max_pixels: int = 4096 * 2048
    """Twice as many for a JPEG, because a large one is decoded at a reduced scale."""
    max_side: int = 16384


DEFAULT_LIMITS = ImageLimits()
SOURCE_LIMITS = ImageLimits(max_bytes=20 * 1024 * 1024, max_pixels=25 * 1000 * 1000)
"""For pictures that become data, which are read in a process of their own, and for batch prediction, which decodes one
such picture at a time: photographs of up to 50 megapixels. Decoding one takes up to three times the memory and
time that the default limits allow."""


class ImageError(DataError):
    """The bytes are not a usable picture. Says what was expected and what was received."""

    def __init__(self, expected: str, received: str):
        super().__init__(f"Expected {expected}, got {received}.")
        self.expected = expected
        self.received = received


class ImageTooLargeError(ImageError):
    """The picture exceeds one of the limits."""


@dataclass(frozen=True)
class Picture:
    """A picture whose size and samples were accepted, not decoded yet."""

    width: int
    height: int
    essence: bytes
    """The parts of the file that pixels and rotation depend on."""
    mode: str = ""
    """Pillow's mode of the pixels of a JPEG that is not rotated; otherwise empty."""


def open_picture(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
    """Check the picture's format and the cost of decoding it. Takes milliseconds for any input."""
    check_size(len(data), limits)
    if data.startswith(_PNG_SIGNATURE):
        parse = _open_png
    elif data.startswith(_JPEG_SIGNATURE):
        parse = _open_jpeg
    else:
        raise ImageError("a PNG or JPEG image", _describe(data))
    try:
        return parse(data, limits)
    except (struct.error, IndexError, ValueError) as error:  # it ends too early
        raise ImageError("a complete PNG or JPEG image", _describe(data)) from error


def prepare_image(
    data: bytes, size: int, fit: Fit = "crop", *, resize: bool = True, limits: ImageLimits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """The picture as a contiguous uint8 array of shape (3, size, size): RGB, channels first.

    With `resize=False` a picture of another size is refused. Raises ImageError.
    """
    picture = open_picture(data, limits)
    if not resize and (picture.width, picture.height) != (size, size):
        raise ImageError(f"a {size}x{size} image", f"{picture.width}x{picture.height} pixels")
    return picture_pixels(picture, size, fit)


def picture_pixels(picture: Picture, size: int, fit: Fit = "crop") -> NDArray[np.uint8]:
    """The pixels of an admitted picture, as `prepare_image` gives them, at height and width `size`.

    Whatever a decoder raises is an ImageError.
    """
    if picture.mode and (picture.width, picture.height) == (size, size):
        # Pillow's decoder without its parser, which would take longer and only find what is already known
        with suppress(ValueError):  # for the reason, see below
            image = Image.frombytes(picture.mode, (size, size), picture.essence, "jpeg", picture.mode, "")
            return _channels_first(image.convert("RGB") if picture.mode == "L" else image)
    try:
        with Image.open(io.BytesIO(picture.essence), formats=("PNG", "JPEG")) as image:
            side = max(_DRAFT_SIDE, 4 * size)
            image.draft(None, (side, side))  # of a large JPEG only a reduced scale is decoded
            num_colors = len(image.palette.palette) // 3 if image.palette else 0
            image.load()
            if image.mode == "P" and np.asarray(image).max() >= num_colors:
                raise ImageError(f"pixels of the palette's {num_colors} colors", "a pixel outside the palette")
            rgb = _to_rgb(_upright(image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, zlib.error
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        raise ImageError("a complete PNG or JPEG image", f"a truncated or damaged one{reason}") from error
    return _channels_first(_scaled(rgb, size, fit))


def scaled_pixels(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A square image (3, side, side) at another size, as `prepare_image` gives it."""
    return _channels_first(_scaled(to_pillow(image), size, "crop"))


def to_pillow(image: NDArray[np.uint8]) -> Image.Image:
    """An image (3, height, width) as Pillow's."""
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def check_size(num_bytes: int, limits: ImageLimits) -> None:
    """Raise ImageTooLargeError for a file that is too long; for callers that know the length before the bytes."""
    if num_bytes > limits.max_bytes:
        raise ImageTooLargeError(f"an image file of at most {limits.max_bytes} bytes", f"{num_bytes} bytes")


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """The identity of an image: hex sha256 of its uint8 pixels in (3, size, size) order."""
    if image.dtype != np.uint8 or image.shape != (3, *image.shape[-1:] * 2):
        raise ValueError(f"expected a uint8 array of shape (3, size, size), got {image.dtype} {image.shape}")
    return sha256_bytes(image.tobytes())


def _open_png(data: bytes, limits: ImageLimits) -> Picture:
    position = len(_PNG_SIGNATURE)
    parts, seen = [data[:position]], set[bytes]()
    length, kind, width, height, depth, color = struct.unpack_from(">I4sIIBB", data, position)
    if (length, kind) != (13, b"IHDR"):
        raise ImageError("a complete PNG image", "one that does not begin with its size")
    _check_pixels(width, height, limits.max_pixels, limits)
    for _ in range(_MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise IndexError(end)
        if kind in seen and kind != b"IDAT":
            raise ImageError("a complete PNG image", f"one with two {kind.decode()} chunks")
        if kind == b"tRNS" and color == _PNG_RGB and depth == 16:
            raise ImageError("an alpha channel or 8-bit samples", "a transparent color of 16-bit samples")
        if kind in _PNG_KEPT and (kind != b"eXIf" or length <= _PNG_MAX_EXIF):
            is_scaled = kind == b"tRNS" and color == _PNG_GRAY and depth in (2, 4)
            parts.append(_scaled_gray(data, position, depth) if is_scaled else data[position:end])
            seen.add(kind)
        if kind == b"IEND":
            return Picture(width, height, b"".join(parts))
        position = end
    raise ImageTooLargeError(f"a PNG with at most {_MAX_PARTS} chunks", "more")


def _scaled_gray(data: bytes, position: int, depth: int) -> bytes:
    """A transparent gray of 2 or 4 bits scaled to 8 bits: Pillow scales the pixels, but not this value."""
    (value,) = struct.unpack_from(">H", data, position + 8)
    body = b"tRNS" + struct.pack(">H", (value & 2**depth - 1) * 255 // (2**depth - 1))
    return struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))


def _open_jpeg(data: bytes, limits: ImageLimits) -> Picture:
    parts, seen = [data[:2]], set[int]()
    position, frame = 2, None
    for _ in range(_MAX_PARTS):
        position = data.index(b"\xff", position) + 1
        marker = data[position]
        if marker in _JPEG_WITHOUT_LENGTH:
            continue
        body = position + 3
        end = position + 1 + max(2, *struct.unpack_from(">H", data, position + 1))
        if marker in _JPEG_FRAMES:
            if frame:
                raise ImageError("a JPEG of one image", "one with two frames")
            frame = _jpeg_frame(data, body, limits)
        if marker == _JPEG_START_OF_SCAN and frame:
            if data.count(b"\xff\xda", position) > _MAX_SCANS:
                raise ImageTooLargeError(f"a JPEG image with at most {_MAX_SCANS} scans", "more")
            width, height, mode = frame
            return Picture(width, height, b"".join([*parts, data[position - 1 :]]), "" if 0xE1 in seen else mode)
        tells = marker in _JPEG_APPLICATION and data.startswith(_JPEG_APPLICATION[marker], body)
        if marker in _JPEG_KEPT or (tells and marker not in seen):
            parts.append(data[position - 1 : end])
            seen.add(marker)
        position = end
    raise ImageTooLargeError(f"a JPEG with at most {_MAX_PARTS} segments", "more")


def _jpeg_frame(data: bytes, frame: int, limits: ImageLimits) -> tuple[int, int, str]:
    """Width, height, and Pillow's mode."""
    bits, height, width, num_components = struct.unpack_from(">BHHB", data, frame)
    if bits != 8:
        raise ImageError("a JPEG with 8-bit samples", f"one with {bits}-bit samples")
    if num_components not in (1, 3):
        raise ImageError("a JPEG in color or gray", "a CMYK one" if num_components == 4 else "another kind")
    _check_pixels(width, height, limits.max_pixels * _JPEG_FACTOR, limits)
    return width, height, "L" if num_components == 1 else "RGB"


def _check_pixels(width: int, height: int, max_pixels: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError("an image with pixels", f"{width}x{height}")
    if width * height > max_pixels or max(width, height) > limits.max_side:
        raise ImageTooLargeError(f"at most {max_pixels} pixels and {limits.max_side} on a side", f"{width}x{height}")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation. ImageOps.exif_transpose would also parse and write every other tag."""
    try:
        method = _TRANSPOSES.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except MemoryError:
        raise
    except Exception:  # a broken EXIF block is treated as absent, as viewers do
        return image
    return image if method is None else image.transpose(method)


def _scaled(rgb: Image.Image, size: int, fit: Fit) -> Image.Image:
    if rgb.size == (size, size):
        return rgb
    if fit == "crop":
        return ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    factor = size / max(rgb.size)
    width, height = (max(1, round(side * factor)) for side in rgb.size)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(rgb.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return canvas


def _channels_first(rgb: Image.Image) -> NDArray[np.uint8]:
    pixels = np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.height, rgb.width, 3)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB pixels of a picture in any mode."""
    if image.mode.startswith("I"):  # 16 bits
        values = np.asarray(image)
        gray = (values >> 8).astype(np.uint8)
        gray[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(gray)
    if not image.has_transparency_data:
        return image.convert("RGB")
    visible = image.convert("RGBA")
    canvas = Image.new("RGB", visible.size, "white")
    canvas.paste(visible, mask=visible.getchannel("A"))
    return canvas


def _describe(data: bytes) -> str:
    """Describes bytes that are not a picture."""
    if not data:
        return "an empty file"
    kind = next((kind for offset, start, kind in _KINDS if data.startswith(start, offset)), "a file of an unknown kind")
    return f"{kind} of {len(data)} bytes"
