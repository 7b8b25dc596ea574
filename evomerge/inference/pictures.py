"""Pictures as models are shown them: files that are what they say, decoded by PIL, in RGB.

What a viewer shows and a decoder gives can differ: a rotation in a camera's tag, a second frame, a colour profile, more
than 8 bits. Where they do, a model would be asked about something that nobody has seen, so such files are refused with
what to do.
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
"""More than cameras give; a file of a few kilobytes can hold billions of one colour."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

THUMBNAIL_SIDE = 192
"""Pixels of the longer side of small copies, at most."""

_SMALL_BYTES = 6_000


def file_media(file: Path, place: str) -> Media:
    """A picture in a file, by what the file holds. Its header is looked at; ``decoded`` looks at the rest.

    Raises:
        InputError: the file cannot be read, or is no picture that can be shown.
    """
    content = read_bytes(file, place, MAX_BYTES)
    _opened(content, file, place)
    return Media("image", file, hashlib.sha256(content).hexdigest())


def held_media(image: Image) -> Media:
    """A picture that a data set holds, by its pixels."""
    about = f"{image.mode} {image.size} ".encode()
    return Media("image", None, hashlib.sha256(about + image.tobytes()).hexdigest(), image)


def decoded(media: Media, place: str) -> Image:
    """The picture in RGB; what is transparent is on white.

    Raises:
        InputError: the file cannot be read, has changed since it was looked at, is cut or damaged, or is no picture
            that can be shown.
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
    """A small copy for people: newly encoded from the pixels, with nothing else of the file in it.

    PNG where that is small, as of drawings; else JPEG.

    Raises:
        InputError: as ``decoded``.
    """
    return _small(decoded(media, place))


def small_copy(content: bytes, place: str) -> bytes:
    """The same of a picture that a program made, by the bytes of its file.

    Raises:
        InputError: they are no picture that can be shown.
    """
    return _small(_in_rgb(_opened(content, Path("that was made"), place)))


def _small(shown: Image) -> bytes:
    from PIL import Image

    shown.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image = Image.new("RGB", shown.size)  # a comment, say, would be saved again with what was read
    image.paste(shown)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if png.tell() <= _SMALL_BYTES:
        return png.getvalue()
    image.save(jpeg, "JPEG", quality=85)
    return jpeg.getvalue()


def media_type(image: bytes) -> str:
    """Which of the two a small copy is."""
    return "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"


def data_url(image: bytes) -> str:
    """A small copy as text that a page can hold."""
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"


def _opened(content: bytes, file: Path, place: str) -> Image:
    """The picture with its header read and looked at."""
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
    """What a decoder did on bytes that are not its own: there is no telling what they raise."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return InputError(place, f"the picture {file} is cut or damaged ({said})", "Copy it again, or leave the item out.")


def _fault(image: Image) -> tuple[str, str] | None:
    """Why a picture is not to be shown, and what to do; None where it is."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"has {width:,} by {height:,} pixels; there may be {MAX_PIXELS:,}", "Save a smaller copy."
    if image.format != "MPO" and getattr(image, "is_animated", False):  # what MPO adds to a photo is another view of it
        return "is animated or has several pages", "Save the one that is meant."
    if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        return f"is in {image.mode}, whose colours depend on a profile", "Save it in RGB."
    if image.mode not in _MODES or any("16" in str(tile) for tile in map(_raw_mode, getattr(image, "tile", ()))):
        return "has more than 8 bits a channel", "Save it with 8 bits, with the brightness that is meant."
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        return "is turned or mirrored by its EXIF tag alone", "Save it upright: `PIL.ImageOps.exif_transpose(image)`."
    return None


def _raw_mode(tile: Any) -> object:
    """How a decoder is told to read a part of a file, such as ``RGB;16B``."""
    return tile[3]


def _in_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
