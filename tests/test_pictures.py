"""Pictures of items: which files are shown to models, as what, and which are refused, with their place."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from evaluators.answers import AnswersSettings
from evaluators.exact_match import ExactMatchSettings, plain
from evaluators.multiple_choice import MultipleChoiceSettings
from evaluators.rouge import RougeSettings
from evomerge.errors import InputError
from evomerge.inference import pictures
from evomerge.inference.media import Media
from evomerge.inference.pictures import data_url, decoded, file_media, held_media, media_type, thumbnail


def drawn(width: int = 12, height: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def large(side: int) -> bytes:
    """A picture that says it is large, of which nothing but the head is read before it is refused."""
    small = encoded(Image.new("1", (1, 1)))
    head = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]  # its width and height, and as before its depth
    return small[:12] + head + zlib.crc32(head).to_bytes(4, "big") + small[33:]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(drawn(), "JPEG", exif=exif)


BAD: dict[str, tuple[bytes, str]] = {
    "truncated png": (encoded(drawn(64, 64))[:-400], "is cut or damaged"),
    "truncated jpeg": (encoded(drawn(64, 64), "JPEG")[:-300], "is cut or damaged"),
    "header alone": (encoded(drawn())[:20], "is cut or damaged|is no picture"),
    "huge": (large(9000), "has 9,000 by 9,000 pixels; there may be 64,000,000"),
    "a bomb": (large(30000), "DecompressionBomb|by 30,000 pixels"),
    "animated gif": (encoded(drawn(), "GIF", save_all=True, append_images=[drawn(seed=1)]), "is animated"),
    "animated png": (encoded(drawn(), save_all=True, append_images=[drawn(seed=1)]), "is animated"),
    "pages": (encoded(drawn(), "TIFF", save_all=True, append_images=[drawn(seed=1)]), "several pages"),
    "cmyk": (encoded(drawn().convert("CMYK"), "JPEG"), "is in CMYK"),
    "16 bits of grey": (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16))), "more than 8 bits"),
    "turned": (turned(), "turned or mirrored by its EXIF tag"),
    "text": (b"a picture of a cat", "is no picture that can be read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture that can be read"),
    "empty": (b"", "is no picture that can be read"),
}  # fmt: skip


def items_of(folder: Path, content: bytes | None) -> Path:
    """Six items, the fourth of whose pictures holds ``content``, or is not there."""
    rows = []
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(drawn(seed=number)))
        rows.append({"question": "What is it?", "picture": f"{number}.png", "answer": f"thing {number}"})
    if content is None:
        (folder / "3.png").unlink()
    else:
        (folder / "3.png").write_bytes(content)
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "items.jsonl"


def asking(file: Path, **more: Any) -> RougeSettings:
    return RougeSettings(file=file, prompt="<image>\n{question}", images=("{picture}",), **more)


@pytest.mark.parametrize("name", BAD)
def test_a_picture_that_cannot_be_shown_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    content, said = BAD[name]
    with pytest.raises(InputError, match=rf"items\.jsonl, line 4: image: .*3\.png.*({said})|line 4: image: .*({said})"):
        asking(items_of(tmp_path, content)).build_and_try()


def test_one_that_is_missing_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 4: image: .*3\.png.*(not exist|no such)"):
        asking(items_of(tmp_path, None)).build()


def test_more_bits_than_eight_are_seen_in_colours_too(tmp_path: Path) -> None:
    """PIL itself gives 8 bits of such a file, without a word."""
    import struct
    import zlib

    rows = b"".join(b"\0" + bytes(12) for _ in range(2))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    file = tmp_path / "deep.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with Image.open(file) as image:
        assert image.mode == "RGB"
    with pytest.raises(InputError, match=r"here: .*more than 8 bits a channel"):
        file_media(file, "here")


@pytest.mark.parametrize(
    ("kind", "change", "wanted"),
    [
        ("PNG", lambda image: image, lambda image: image),
        ("BMP", lambda image: image, lambda image: image),
        ("TIFF", lambda image: image, lambda image: image),
        ("PNG", lambda image: image.convert("L"), lambda image: image.convert("L").convert("RGB")),
        ("PNG", lambda image: image.quantize(16), lambda image: image.quantize(16).convert("RGB")),
        ("PNG", lambda image: image.convert("1"), lambda image: image.convert("1").convert("RGB")),
        ("PNG", lambda image: image.convert("RGBA"), lambda image: image),
    ],
)
def test_others_are_shown_as_pil_decodes_them_to_rgb(
    tmp_path: Path,
    kind: str,
    change: Callable[[Image.Image], Image.Image],
    wanted: Callable[[Image.Image], Image.Image],
) -> None:
    file = tmp_path / "picture"
    file.write_bytes(encoded(change(drawn()), kind))
    found = decoded(file_media(file, "here"), "here")
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted(drawn())))


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    image = drawn().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.putpixel((3, 2), (10, 20, 30, 255))
    file = tmp_path / "clear.png"
    file.write_bytes(encoded(image))
    found = np.asarray(decoded(file_media(file, "here"), "here"))
    assert found[2, 3].tolist() == [10, 20, 30]
    assert (np.delete(found.reshape(-1, 3), 2 * image.width + 3, axis=0) == 255).all()


def test_the_hint_of_a_turned_one_puts_it_upright(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(turned())
    with Image.open(file) as image:
        ImageOps.exif_transpose(image).save(file)
    assert decoded(file_media(file, "here"), "here").size == (8, 12)


def test_a_picture_that_changes_after_it_was_checked_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(drawn()))
    media = file_media(file, "here")
    file.write_bytes(encoded(drawn(seed=1)))
    with pytest.raises(InputError, match=r"here: the picture .* has changed"):
        decoded(media, "here")


def test_a_picture_is_told_by_what_it_shows(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(drawn()))
    one, other = (file_media(tmp_path / name, "here") for name in ("a.png", "b.png"))
    assert one.sha256 == other.sha256
    held = [held_media(image).sha256 for image in (drawn(), drawn(), drawn(seed=1), drawn().convert("L"))]
    assert held[0] == held[1]
    assert len(set(held)) == 3


def test_small_copies_hold_nothing_of_the_file_but_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(drawn(800, 400), "JPEG", exif=exif, comment=b"a secret"))
    small = thumbnail(file_media(file, "here"), "here")
    assert b"secret" in file.read_bytes()
    assert b"secret" not in small
    with Image.open(io.BytesIO(small)) as image:
        assert max(image.size) == pictures.THUMBNAIL_SIDE
        assert image.format == "JPEG"
    assert media_type(small) == "image/jpeg"
    tiny = thumbnail(held_media(Image.new("RGB", (60, 60))), "here")
    assert data_url(tiny).startswith("data:image/png;base64,iVBOR")


# ---- items -----------------------------------------------------------------------------------------------------------


def test_items_are_told_apart_and_divided_by_their_pictures(tmp_path: Path) -> None:
    """All ask the same; half of them show one picture."""
    rows = []
    for number in range(40):
        name = f"{number}.png" if number % 2 else "same.png"
        (tmp_path / name).write_bytes(encoded(drawn(seed=number % 2 * number)))
        rows.append({"question": "What is it?", "picture": name, "answer": f"thing {number}"})
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluator = asking(file).build()
    shown = {split: {item.media[0].sha256 for item in evaluator.items(split)} for split in ("search", "held_out")}  # type: ignore[arg-type]
    assert not shown["search"] & shown["held_out"]
    assert len(shown["search"]) > 3
    assert len(shown["held_out"]) > 3
    ids = [item.id for split in ("search", "held_out") for item in evaluator.items(split)]  # type: ignore[arg-type]
    assert len(set(ids)) == 40
    (tmp_path / "1.png").write_bytes(encoded(drawn(seed=99)))
    assert asking(file).build().version != evaluator.version


@pytest.mark.parametrize(
    ("settings", "prompt", "said"),
    [
        (RougeSettings, "{question}", "says <image> 0 times, and there are 1 pictures"),
        (ExactMatchSettings, "<image><image>{question}", "says <image> 2 times, and there are 1 pictures"),
    ],
)
def test_the_prompt_says_where_each_picture_stands(
    tmp_path: Path, settings: type[AnswersSettings], prompt: str, said: str
) -> None:
    file = items_of(tmp_path, encoded(drawn()))
    with pytest.raises(InputError, match=f"line 1: its prompt {said}"):
        settings(file=file, prompt=prompt, images=("{picture}",)).build()


def test_choices_have_pictures_too(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    rows = []
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(encoded(drawn(seed=number)))
        rows.append({"question": "Which?", "picture": f"{number}.png", "choices": ["a", "b"], "answer": number % 2})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = MultipleChoiceSettings(file=file, prompt="<image>{question}", images=("{picture}",))
    evaluator = asked.build_and_try()
    assert all(isinstance(item.media[0], Media) for item in evaluator.items("search"))
    (tmp_path / "5.png").write_bytes(BAD["truncated png"][0])
    with pytest.raises(InputError, match="line 6: image"):
        asked.build_and_try()


@pytest.mark.parametrize(
    ("reference", "answer", "wanted"),
    [
        ("a cat", " A cat. ", 1.0), ("猫", "猫です", 0.0), ("１２匹", "12匹。", 1.0), ("two  dogs", "two\ndogs", 1.0),
        ("a cat", "", 0.0), ("3.5", "3.5.", 1.0), ("3.5", "35", 0.0),
    ],
)  # fmt: skip
def test_exact_match(reference: str, answer: str, wanted: float) -> None:
    assert float(plain(reference) == plain(answer)) == wanted
