"""Decodes pictures for models: files of supported formats, decoded by PIL to RGB.

What a viewer shows and a decoder returns can differ: because of a rotation in an EXIF tag, a second frame, a colour
profile, or more than 8 bits. A model would then be asked about something that nobody has seen, so such files are
rejected with a hint how to fix them.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError
from evomerge.files import read_bytes
from evomerge.inference.media import Media

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 64_000_000
MAX_PIXELS = 64_000_000
"""More than cameras produce; a file of a few kilobytes can hold billions of pixels of one colour."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

THUMBNAIL_SIDE = 192
"""Maximum length of the longer side of small copies, in pixels."""

_SMALL_BYTES = 6_000


def file_media(file: Path, place: str) -> Media:
    """A picture in a file, identified by the file's content. Only its header is checked; ``decoded`` checks the rest.

    Raises:
        InputError: the file cannot be read, or is not a supported picture.
    """
    content = read_bytes(file, place, MAX_BYTES)
    _opened(content, file, place)
    return Media("image", file, hashlib.sha256(content).hexdigest())


def held_media(image: Image) -> Media:
    """A picture held by a data set, identified by its pixels."""
    about = f"{image.mode} {image.size} ".encode()
    return Media("image", None, hashlib.sha256(about + image.tobytes()).hexdigest(), image)


def decoded(media: Media, place: str) -> Image:
    """The picture in RGB, with transparency on white.

    Raises:
        InputError: the file cannot be read, has changed since it was checked, is truncated or damaged, or is not a
            supported picture.
    """
    if media.file is None:
        return _in_rgb(media.held)
    content = read_bytes(media.file, place, MAX_BYTES)
    if media.sha256 and hashlib.sha256(content).hexdigest() != media.sha256:
        raise InputError(place, f"the picture {media.file} has changed since it was first read", "Put it back.")
    image = _opened(content, media.file, place)
    try:
        return _in_rgb(image)
    except Exception as error:
        raise _damaged(media.file, place, error) from error


def thumbnail(media: Media, place: str) -> bytes:
    """A small copy for display, encoded from the pixels, without any metadata of the file.

    PNG if that is small, as for drawings; otherwise JPEG.

    Raises:
        InputError: as for ``decoded``.
    """
    return _small(decoded(media, place))


def small_copy(content: bytes, place: str) -> bytes:
    """The same for a picture that a program made, given the bytes of its file.

    Raises:
        InputError: they are not a supported picture.
    """
    return _small(_in_rgb(_opened(content, Path("that was made"), place)))


def _small(shown: Image) -> bytes:
    from PIL import Image

    shown.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image = Image.new("RGB", shown.size)  # saving the opened image would keep metadata such as comments
    image.paste(shown)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if png.tell() <= _SMALL_BYTES:
        return png.getvalue()
    image.save(jpeg, "JPEG", quality=85)
    return jpeg.getvalue()


def media_type(image: bytes) -> str:
    """The media type of a small copy: PNG or JPEG."""
    return "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"


def data_url(image: bytes) -> str:
    """A small copy as a data URL for a page."""
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"


def _opened(content: bytes, file: Path, place: str) -> Image:
    """The picture, after reading and checking its header."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        fault = _fault(image)
    except UnidentifiedImageError:
        known = ", ".join(_FORMATS)
        raise InputError(place, f"{file} is no picture that can be read", f"Save it as one of {known}.") from None
    except Exception as error:
        raise _damaged(file, place, error) from error
    if fault is not None:
        raise InputError(place, f"the picture {file} {fault[0]}", fault[1])
    return image


def _damaged(file: Path, place: str, error: Exception) -> InputError:
    """The error for an exception in a decoder: decoders may raise anything on malformed data."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return InputError(place, f"the picture {file} is cut or damaged ({said})", "Copy it again, or leave the item out.")


def _fault(image: Image) -> tuple[str, str] | None:
    """Why a picture is not supported, and what to do; None if it is."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"has {width:,} by {height:,} pixels; there may be {MAX_PIXELS:,}", "Save a smaller copy."
    if image.format != "MPO" and getattr(image, "is_animated", False):  # in MPO, another view of the same photo
        return "is animated or has several pages", "Save the one that is meant."
    if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        return f"is in {image.mode}, whose colours depend on a profile", "Save it in RGB."
    if image.mode not in _MODES or any("16" in str(tile) for tile in map(_raw_mode, getattr(image, "tile", ()))):
        return "has more than 8 bits a channel", "Save it with 8 bits, with the brightness that is meant."
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        return "is turned or mirrored by its EXIF tag alone", "Save it upright: `PIL.ImageOps.exif_transpose(image)`."
    return None


def _raw_mode(tile: Any) -> object:
    """The raw mode with which a decoder reads a part of a file, such as ``RGB;16B``."""
    return tile[3]


def _in_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
