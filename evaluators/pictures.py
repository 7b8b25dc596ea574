"""Pictures of items in JSON Lines files, for every evaluator that reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import field_validator

from evaluators.base import Item, Split
from evaluators.item_files import check_template, fill
from evaluators.prompts import FewshotSettings
from evomerge.errors import InputError
from evomerge.inference.media import IMAGE, Media
from evomerge.inference.pictures import decoded, file_media
from evomerge.json_lines import Line


class PictureSettings(FewshotSettings):
    """Settings of evaluators whose items may contain pictures.

    Attributes:
        images: the files of an item's pictures, templates like the prompt, relative to the file of items. The prompt
            has ``<image>`` at the position of each picture, in order.
    """

    images: tuple[str, ...] = ()

    @field_validator("images")
    @classmethod
    def _are_templates(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_template, texts))

    def pictures(self, line: Line, prompt: str, folder: Path) -> tuple[Media, ...]:
        """The pictures of an item.

        Raises:
            InputError: a file that cannot be read or decoded, or a prompt without a position for each picture.
        """
        if self.images and prompt.count(IMAGE) != len(self.images):
            problem = f"its prompt says {IMAGE} {prompt.count(IMAGE)} times, and there are {len(self.images)} pictures"
            raise InputError(line.place, problem, f'Write {IMAGE} once for each: `prompt: "{IMAGE}\\n{{question}}"`.')
        files = [fill("images", template, line) for template in self.images]
        return tuple(file_media(folder / file, f"{line.place}: image") for file in files)


def check_pictures(splits: Mapping[Split, Sequence[Item]]) -> None:
    """Decode every picture once.

    Raises:
        InputError: one is truncated or damaged.
    """
    for item in (item for items in splits.values() for item in items):
        for media in item.media:
            decoded(media, f"{item.place}: image")


def content_of(media: Iterable[Media]) -> list[str]:
    """The content of pictures, for hashes of items."""
    return [one.sha256 for one in media]
