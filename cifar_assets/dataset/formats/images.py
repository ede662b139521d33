"""One way from picture bytes to the 32x32 pixels a model sees, used for stored data and for requests alike.

Accepted: JPEG and PNG, under any name or content type. Every other format is refused by name, and so are samples that
would not be read exactly: CMYK and 12-bit JPEG, and a transparent color in a 16-bit RGB PNG. Of an animated PNG, the
default image counts. EXIF rotation is applied. Transparent parts show a white background. 16-bit samples keep their
high byte. Color profiles are ignored. A picture of another size is cropped to its central square and scaled with an
antialiased bicubic filter; a 32x32 picture keeps the pixels that Pillow decodes.

Pillow never sees the whole file, only the parts that the pixels and the rotation depend on. So texts, profiles and
previews cost nothing, and Pillow and its decoders cannot disagree about a file's size.
"""

import io
import re
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_assets.contracts import IMAGE_SHAPE, IMAGE_SIZE
from resources.digests import sha256_bytes
from resources.errors import DataError

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
_DRAFT_SIZE = (8 * IMAGE_SIZE, 8 * IMAGE_SIZE)
_MAX_ROTATION_BYTES = 64 << 10
"""Of the EXIF block, and of each text that may hold the rotation."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_ONCE = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IEND")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ROTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_PNG_GRAY, _PNG_RGB, _PNG_PALETTE = 0, 2, 3

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_START_OF_SCAN = 0xDA
_JPEG_WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xD9))
_JPEG_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_JPEG_PIXELS = (*_JPEG_FRAMES, 0xC4, 0xCC, 0xDB, 0xDD)
"""Frames and the tables to decode them with."""
_JPEG_APPLICATION = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
_JPEG_ROTATION = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")

_KINDS = [
    (re.compile(start, re.DOTALL), kind)
    for start, kind in (
        (rb"\x89PNG\r\n\x1a\n", "a truncated or damaged PNG file"),
        (rb"\xff\xd8\xff", "a truncated or damaged JPEG file"),
        (rb".{8}WEBP", "a WebP image"),
        (rb"GIF8", "a GIF image"),
        (rb"BM", "a BMP image"),
        (rb"II[*+]\x00|MM\x00[*+]", "a TIFF image"),
        (rb"%PDF", "a PDF document"),
        (rb"8BPS", "a Photoshop file"),
        (rb"\x00\x00\x01\x00", "an ICO icon"),
        (rb"PK\x03\x04", "a ZIP archive"),
        (rb"\x1f\x8b", "a gzip file"),
        (rb"\xff\x0a|.{4}JXL ", "a JPEG XL image"),
        (rb".{4}jP  ", "a JPEG 2000 image"),
        (rb".{4}ftypavif", "an AVIF image"),
        (rb".{4}ftyp(hei|mif1)", "a HEIC image"),
        (rb"P[1-7]\s", "a Netpbm (PNM) image"),
        (rb"(?i)\s*<(svg|\?xml)", "an SVG or XML document"),
        (rb"(?i)\s*<(!doctype html|html)", "an HTML page"),
    )
]
"""What other files begin with."""


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost. All are decided from its bytes, before any pixel is decoded.

    Together they keep the memory of one decoding below about 150 MB and its time below a second. A JPEG is decoded at a
    reduced scale where it is large and may have `jpeg_factor` times as many pixels.
    """

    max_bytes: int = 10 * 1024 * 1024
    max_pixels: int = 4096 * 2048
    max_side: int = 16384
    jpeg_factor: int = 2
    max_parts: int = 4096
    """Chunks of a PNG, segments of a JPEG."""
    max_scans: int = 32
    """Passes over the pixels of a progressive JPEG."""


DEFAULT_LIMITS = ImageLimits()


class ImageError(DataError):
    """The bytes are not a picture that can be used. Says what was expected and what came."""

    def __init__(self, expected: str, received: str):
        super().__init__(f"Expected {expected}, got {received}.")
        self.expected = expected
        self.received = received


class ImageTooLargeError(ImageError):
    """The picture is over one of the limits."""


@dataclass(frozen=True)
class Picture:
    """A picture whose size and samples are admitted, not decoded yet."""

    width: int
    height: int
    essence: bytes
    """The file without what neither pixels nor rotation depend on."""
    transparent_gray: int | None = None
    """Of a gray PNG below 8 bits: the transparent value, scaled to 8 bits as the pixels are."""
    num_colors: int | None = None
    """Of a PNG with a palette."""


def open_picture(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
    """Check what the picture is and what decoding it would cost. Takes milliseconds whatever the bytes are."""
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


def prepare_image(data: bytes, *, resize: bool = True, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """The picture as a contiguous uint8 array of shape (3, 32, 32): RGB, channels first.

    With `resize=False` a picture of another size is refused. Raises ImageError.
    """
    picture = open_picture(data, limits)
    if not resize and (picture.width, picture.height) != _SIZE:
        raise ImageError(f"a {IMAGE_SIZE}x{IMAGE_SIZE} image", f"{picture.width}x{picture.height} pixels")
    return picture_pixels(picture)


def picture_pixels(picture: Picture) -> NDArray[np.uint8]:
    """The pixels of an admitted picture, as `prepare_image` gives them. Whatever a decoder raises is an ImageError."""
    try:
        with Image.open(io.BytesIO(picture.essence), formats=("PNG", "JPEG")) as image:
            image.draft(None, _DRAFT_SIZE)  # of a large JPEG only a reduced scale is decoded
            image.load()
            if picture.transparent_gray is not None:
                image.info["transparency"] = picture.transparent_gray
            if picture.num_colors is not None and np.asarray(image).max() >= picture.num_colors:
                raise ImageError(f"pixels of the palette's {picture.num_colors} colors", "one that is not among them")
            rgb = _to_rgb(_upright(image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, zlib.error
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        raise ImageError("a complete PNG or JPEG image", f"a truncated or damaged one{reason}") from error
    if rgb.size != _SIZE:
        rgb = ImageOps.fit(rgb, _SIZE, Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))


def check_size(num_bytes: int, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Refuse a file that is too long with ImageTooLargeError; for callers that know the length before the bytes."""
    if num_bytes > limits.max_bytes:
        raise ImageTooLargeError(f"an image file of at most {limits.max_bytes} bytes", f"{num_bytes} bytes")


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """The identity of an image: sha256 hex of its uint8 pixels in (3, 32, 32) order."""
    if image.dtype != np.uint8 or image.shape != IMAGE_SHAPE:
        raise ValueError(f"expected a uint8 array of shape {IMAGE_SHAPE}, got {image.dtype} {image.shape}")
    return sha256_bytes(image.tobytes())


def _open_png(data: bytes, limits: ImageLimits) -> Picture:
    position = len(_PNG_SIGNATURE)
    parts, seen = [data[:position]], set()
    length, kind, width, height, depth, color = struct.unpack_from(">I4sIIBB", data, position)
    if (length, kind) != (13, b"IHDR"):
        raise ImageError("a complete PNG image", "one that does not begin with its size")
    _check_pixels(width, height, limits.max_pixels, limits)
    transparent_gray, num_colors = None, 0 if color == _PNG_PALETTE else None
    for _ in range(limits.max_parts):
        length, kind = struct.unpack_from(">I4s", data, position)
        body, end = position + 8, position + 12 + length
        if end > len(data):
            raise IndexError(end)
        if kind in seen and kind in _PNG_ONCE:
            raise ImageError("a complete PNG image", f"one with two {kind.decode()} chunks")
        if kind == b"PLTE" and color == _PNG_PALETTE:
            num_colors = length // 3
        if kind == b"tRNS" and color == _PNG_RGB and depth == 16:
            raise ImageError("a PNG with an alpha channel or 8-bit samples", "a transparent color of 16-bit samples")
        if kind == b"tRNS" and color == _PNG_GRAY and depth in (2, 4):
            transparent_gray = struct.unpack_from(">H", data, body)[0] * 255 // (2**depth - 1)
        if kind == b"eXIf" or (kind in _PNG_TEXTS and data.startswith(_PNG_ROTATION_TEXTS, body)):
            keep = kind not in seen and length <= _MAX_ROTATION_BYTES
        else:
            keep = kind == b"IDAT" or kind in _PNG_ONCE
        if keep:
            parts.append(data[position:end])
            seen.add(kind)
        if kind == b"IEND":
            return Picture(width, height, b"".join(parts), transparent_gray, num_colors)
        position = end
    raise ImageTooLargeError(f"a PNG of at most {limits.max_parts} chunks", "more")


def _open_jpeg(data: bytes, limits: ImageLimits) -> Picture:
    parts, rotations = [data[:2]], set()
    position, size = 2, None
    for _ in range(limits.max_parts):
        position = data.index(b"\xff", position) + 1
        marker = data[position]
        if marker == 0xFF or marker in _JPEG_WITHOUT_LENGTH:
            continue
        body = position + 3
        end = position + 1 + max(2, *struct.unpack_from(">H", data, position + 1))
        if marker in _JPEG_FRAMES:
            if size:
                raise ImageError("a JPEG of one image", "one with two frames")
            size = _jpeg_size(data, body, limits)
        if marker == _JPEG_START_OF_SCAN and size:
            if data.count(b"\xff\xda", position) > limits.max_scans:
                raise ImageTooLargeError(f"a JPEG image of at most {limits.max_scans} scans", "more")
            return Picture(*size, b"".join([*parts, data[position - 1 :]]))
        rotation = next((start for start in _JPEG_ROTATION if marker == 0xE1 and data.startswith(start, body)), None)
        is_application = marker in _JPEG_APPLICATION and data.startswith(_JPEG_APPLICATION[marker], body)
        if marker in _JPEG_PIXELS or is_application or (rotation and rotation not in rotations):
            parts.append(data[position - 1 : end])
            rotations.add(rotation)
        position = end
    raise ImageTooLargeError(f"a JPEG of at most {limits.max_parts} segments", "more")


def _jpeg_size(data: bytes, frame: int, limits: ImageLimits) -> tuple[int, int]:
    bits, height, width, num_components = struct.unpack_from(">BHHB", data, frame)
    if bits != 8:
        raise ImageError("a JPEG with 8-bit samples", f"one with {bits}-bit samples")
    if num_components not in (1, 3):
        raise ImageError("a JPEG in color or gray", "a CMYK one" if num_components == 4 else "another kind")
    _check_pixels(width, height, limits.max_pixels * limits.jpeg_factor, limits)
    return width, height


def _check_pixels(width: int, height: int, max_pixels: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError("an image with pixels", f"{width}x{height}")
    if width * height > max_pixels:
        raise ImageTooLargeError(f"at most {max_pixels} pixels", f"{width}x{height} = {width * height}")
    if max(width, height) > limits.max_side:
        raise ImageTooLargeError(f"sides of at most {limits.max_side} pixels", f"{width}x{height}")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation. A broken EXIF block is treated as absent, as viewers do."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the EXIF parser raises SyntaxError, struct.error, TypeError and more on broken blocks
        return image
    method = _TRANSPOSES.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB pixels of a picture of any mode."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is None:
        return image
    if image.mode.startswith("I"):  # 16 bits
        values = np.asarray(image)
        gray = (values >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            gray[values == transparent] = BACKGROUND[0]
        return Image.fromarray(gray, "L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    visible = image.convert("RGBA")
    canvas = Image.new("RGB", visible.size, BACKGROUND)
    canvas.paste(visible, mask=visible.getchannel("A"))
    return canvas


def _describe(data: bytes) -> str:
    """What bytes that are not a picture look like, in words."""
    if not data:
        return "an empty file"
    for start, kind in _KINDS:
        if start.match(data):
            return f"{kind} of {len(data)} bytes"
    is_text = re.fullmatch(rb"[\s -~]*", data[:512])
    return f"{len(data)} bytes of {'text' if is_text else 'an unknown kind'}"
