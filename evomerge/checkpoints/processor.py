"""Checks and loads the processor in a source's folder, which converts images and texts to model inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.folder import IMAGE_PROCESSORS, load_json, processor_files
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError

_NONE = "Copy the processor's files from the folder that the model came in: processor_config.json and those like it."


def check_processor(source: Source) -> None:
    """Reject a source that cannot be asked about images. Loads nothing.

    Raises:
        InputError: it is a text model, has no processor, or one that loads code.
    """
    if not source.takes_images:
        kind = source.config["model_type"]
        problem = f"is a {kind}, a text model, and is asked about images"
        raise InputError(source.place, problem, "Name a model that reads images, and let it provide the tokenizer.")
    files = processor_files(source.folder)
    if not any(file.name in IMAGE_PROCESSORS for file in files):
        raise InputError(source.place, f"has no processor for images in {source.folder}", _NONE)
    for file in files:
        if any(key == "auto_map" and value for key, value in _walk(load_json(file, source.place))):
            problem = f"{file.name}: auto_map asks for code from the model's folder"
            hint = "Read what it names; if transformers knows the processor without it, delete the key from a copy."
            raise InputError(source.place, problem, hint)


def open_processor(source: Source) -> Any:
    """The processor of a source as loaded by transformers, with the source's tokenizer set up as for texts.

    Raises:
        InputError: as for ``check_processor``, or it cannot be loaded.
    """
    from transformers import AutoProcessor  # takes two seconds, and is only needed for images

    check_processor(source)
    try:
        processor = AutoProcessor.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an unusual setting may raise anything inside transformers
        hint = "Some need torchvision: `pip install torchvision`." if "torchvision" in str(error).lower() else ""
        raise InputError(source.place, f"its processor cannot be loaded: {first_line(error)}", hint) from error
    if not hasattr(processor, "image_processor"):
        raise InputError(source.place, f"its processor ({type(processor).__name__}) takes no images", _NONE)
    processor.tokenizer = load_tokenizer(source)
    return processor


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _walk(value)
