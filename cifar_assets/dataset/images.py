"""One way from picture bytes to the 32x32 pixels a model sees, used for stored data and for requests alike.

Accepted: PNG, JPEG, WebP, GIF (its first frame), BMP and TIFF, whatever name or content type they came under.
EXIF rotation is applied. Transparent parts show a white background. 16-bit samples keep their high byte. Colour
profiles are ignored. A picture of another size is cut to its central square and scaled with an antialiased bicubic
filter; a 32x32 picture keeps the pixels that Pillow decodes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_assets.contracts import IMAGE_SHAPE, IMAGE_SIZE
from cifar_assets.digests import sha256_bytes
from cifar_assets.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "PNG, JPEG, WebP, GIF, BMP or TIFF"
BACKGROUND = (255, 255, 255)
"""RGB shown where a picture is transparent."""

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
_SIZE = (IMAGE_SIZE, IMAGE_SIZE)
_JPEG_SCAN_MARKER = b"\xff\xda"
_MAX_JPEG_SCANS = 100
_MAX_GIF_BLOCKS = 100_000
_DRAFT_SIZE = (8 * IMAGE_SIZE, 8 * IMAGE_SIZE)
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_KNOWN_SIGNATURES = (
    (0, b"%PDF", "a PDF document"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\x00\x00\x01\x00", "an ICO icon"),
    (0, b"qoif", "a QOI image"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (4, b"JXL ", "a JPEG XL image"),
    (4, b"jP  ", "a JPEG 2000 image"),
    (4, b"ftypavif", "an AVIF image"),
    (4, b"ftyphei", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (4, b"ftyp", "an MP4-like media file"),
)
_FORMAT_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost. All are decided from its size and headers, before any pixel is decoded.

    `max_pixels` keeps the memory of one decoding below about 200 MB in every format. A JPEG is decoded at a reduced
    scale where it is large and may have `jpeg_factor` times as many.
    """

    max_bytes: int = 10 * 1024 * 1024
    max_pixels: int = 4096 * 2048
    jpeg_factor: int = 2
    max_frames: int = 1000


DEFAULT_LIMITS = ImageLimits()


class ImageError(DataError):
    """The bytes are no picture that can be used. Says what was expected and what came."""

    def __init__(self, expected: str, received: str):
        super().__init__(f"Expected {expected}, got {received}.")
        self.expected = expected
        self.received = received


class ImageTooLargeError(ImageError):
    """The picture is over one of the limits."""


def prepare_image(data: bytes, *, resize: bool = True, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """The picture as a contiguous uint8 array of shape (3, 32, 32): RGB, channels first.

    With `resize=False` a picture of another size is refused. Raises ImageError.
    """
    check_size(len(data), limits)
    if not data:
        raise ImageError(f"a {FORMAT_NAMES} image", "an empty file")
    if data.startswith(b"GIF8"):
        _check_gif_blocks(data, limits)
    elif data.startswith(b"\xff\xd8") and data.count(_JPEG_SCAN_MARKER) > _MAX_JPEG_SCANS:
        raise ImageTooLargeError(f"a JPEG image of at most {_MAX_JPEG_SCANS} scans", "more")
    with _decoding_faults(data), _open(data) as image:
        _check_header(image, limits)
        if not resize and image.size != _SIZE:
            raise ImageError(f"a {IMAGE_SIZE}x{IMAGE_SIZE} image", f"{image.size[0]}x{image.size[1]} pixels")
        image.draft(None, _DRAFT_SIZE)
        image.load()
        rgb = _to_rgb(_upright(image))
        if rgb.size != _SIZE:
            rgb = ImageOps.fit(rgb, _SIZE, Image.Resampling.BICUBIC)
        pixels = np.asarray(rgb, dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check_size(num_bytes: int, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Refuse a file that is too long with ImageTooLargeError; for callers that know the length before the bytes."""
    if num_bytes > limits.max_bytes:
        raise ImageTooLargeError(f"an image file of at most {limits.max_bytes} bytes", f"{num_bytes} bytes")


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """The identity of an image: sha256 hex of its uint8 pixels in (3, 32, 32) order."""
    if image.dtype != np.uint8 or image.shape != IMAGE_SHAPE:
        raise ValueError(f"expected a uint8 array of shape {IMAGE_SHAPE}, got {image.dtype} {image.shape}")
    return sha256_bytes(image.tobytes())


@contextmanager
def _decoding_faults(data: bytes) -> Iterator[None]:
    """Turn whatever a decoder throws at hostile bytes into ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"a {FORMAT_NAMES} image", _describe(data)) from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("an image of a size that is safe to decode", str(error)) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, zlib.error
        raise ImageError(f"a complete {FORMAT_NAMES} image", f"a truncated or damaged one ({error})") from error


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check_header(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("an image with pixels", f"{width}x{height}")
    max_pixels = limits.max_pixels * (limits.jpeg_factor if image.format in ("JPEG", "MPO") else 1)
    if width * height > max_pixels:
        raise ImageTooLargeError(f"at most {max_pixels} pixels", f"{width}x{height} = {width * height}")
    if image.format == "TIFF":
        _check_tiff_frames(image, limits)
    elif image.format != "GIF" and getattr(image, "n_frames", 1) > limits.max_frames:
        raise _too_many_frames(limits)


def _check_tiff_frames(image: Image.Image, limits: ImageLimits) -> None:
    """Walk the TIFF's directories no further than the limit; `n_frames` would walk all of them."""
    try:
        image.seek(limits.max_frames)
    except EOFError:
        image.seek(0)
    else:
        raise _too_many_frames(limits)


def _check_gif_blocks(data: bytes, limits: ImageLimits) -> None:
    """Count a GIF's frames and data blocks no further than the limits; Pillow's count would set up every frame."""
    if len(data) < 13:
        return
    position = 13 + _gif_palette_bytes(data[10])
    num_frames = num_blocks = 0
    while position < len(data):
        marker = data[position]
        if marker == 0x2C and position + 9 < len(data):
            num_frames += 1
            position += 11 + _gif_palette_bytes(data[position + 9])
        elif marker == 0x21:
            position += 2
        else:
            return
        while position < len(data) and data[position]:
            position += 1 + data[position]
            num_blocks += 1
            if num_blocks > _MAX_GIF_BLOCKS:
                raise ImageTooLargeError(f"a GIF of at most {_MAX_GIF_BLOCKS} data blocks", "more")
        position += 1
        if num_frames > limits.max_frames:
            raise _too_many_frames(limits)


def _gif_palette_bytes(flags: int) -> int:
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0


def _too_many_frames(limits: ImageLimits) -> ImageTooLargeError:
    return ImageTooLargeError(f"at most {limits.max_frames} frames", "more")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation. A broken EXIF block is treated as absent, as viewers do; TIFF is turned on load."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the EXIF parser raises SyntaxError, struct.error, TypeError and more on broken blocks
        return image
    method = _TRANSPOSES.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB pixels of a picture of any mode."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        return _sixteen_bit_to_rgb(image)
    if image.mode == "F":
        raise ImageError("8-bit or 16-bit samples", "32-bit floating point ones")
    if not image.has_transparency_data:
        return image.convert("RGB")
    visible = image.convert("RGBA")
    canvas = Image.new("RGB", visible.size, BACKGROUND)
    canvas.paste(visible, mask=visible.getchannel("A"))
    return canvas


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise ImageError("8-bit or 16-bit samples", f"values from {values.min()} to {values.max()}")
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = BACKGROUND[0]
    return Image.fromarray(grey, "L").convert("RGB")


def _describe(data: bytes) -> str:
    """What bytes that no decoder took look like, in words."""
    for offset, signature, name in _KNOWN_SIGNATURES:
        if data.startswith(signature, offset):
            return f"{name} of {len(data)} bytes"
    for offset, signature, name in _FORMAT_SIGNATURES:
        if data.startswith(signature, offset):
            return f"a truncated or damaged {name} file of {len(data)} bytes"
    if data[:1] == b"P" and data[1:2] in b"1234567":
        return f"a Netpbm (PNM) image of {len(data)} bytes"
    start = data[:512].decode("latin-1").lstrip().lower()
    if not start.isascii() or not all(letter.isprintable() or letter.isspace() for letter in start):
        return f"{len(data)} bytes of an unknown kind"
    if start.startswith(("<svg", "<?xml")):
        return f"an SVG or XML document of {len(data)} bytes"
    if start.startswith(("<!doctype html", "<html")):
        return f"an HTML page of {len(data)} bytes"
    return f"{len(data)} bytes of text"
