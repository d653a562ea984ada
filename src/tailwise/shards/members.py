"""Which members of a tar are the image and the caption of a sample, by suffix; and captions in fields of its JSON.

A suffix is all of a member's name behind the key, as webdataset splits it: `0001.input.jpg` has the suffix `input.jpg`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import read_record
from tailwise.errors import UserError

JSON = "json"
JSON_FIELD = "json:"  # begins a caption that is a field of the JSON; names of nested fields follow, joined by dots
# Images that other tools take: they are no reason to look for lost files.
OTHER_IMAGES = frozenset({"avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jxl", "ppm", "tif", "tiff"})


@dataclass(frozen=True)
class MemberChoice:
    """Suffixes of images and captions, in order of preference: the first that a sample has, and that is not empty, is taken."""

    images: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    captions: tuple[str, ...] = ("txt",)  # suffixes; or JSON_FIELD and the names of nested fields, joined by dots

    @classmethod
    def given(cls, image: str | None, caption: str | None, default: MemberChoice | None = None) -> MemberChoice:
        """Return the choice of texts such as "input.jpg,png" and "outputs.txt,json:alt.text"; None leaves the default.

        Raises:
            UserError: a suffix is empty, given twice, or both an image and a caption; or no name can have it.
        """
        default = default or cls()
        images = default.images if image is None else _suffixes("image", image)
        captions = default.captions if caption is None else _suffixes("caption", caption)
        if both := sorted({*images} & {*captions}):
            raise UserError(f"{both[0]!r} is given as `image` and as `caption`: give each suffix once")
        return cls(images, captions)

    @classmethod
    def of(cls, catalog: Catalog) -> MemberChoice:
        """Return the choice that the tars of a catalog were imported with."""
        path = catalog.folder / layout.MEMBERS
        if not path.exists():
            return cls()
        return cls(**{name: tuple(suffixes) for name, suffixes in read_record(path).items()})

    def record(self) -> dict[str, list[str]]:
        """Return the choice as JSON values."""
        return {name: list(suffixes) for name, suffixes in asdict(self).items()}

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Fields of the JSON that are captions, in order of preference."""
        return tuple(name.removeprefix(JSON_FIELD) for name in self.captions if name.startswith(JSON_FIELD))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Suffixes of members that are, or hold, captions."""
        return tuple(dict.fromkeys(JSON if name.startswith(JSON_FIELD) else name for name in self.captions))

    @cached_property
    def halves(self) -> Mapping[str, int]:
        """1 for each suffix of an image, 2 for each of a caption: a sample has both."""
        return dict.fromkeys((*OTHER_IMAGES, *self.images), 1) | dict.fromkeys(self.texts, 2)


def _suffixes(parameter: str, text: str) -> tuple[str, ...]:
    """Return the suffixes of a text, without leading dots and in lower case; fields of the JSON as they are."""
    found = []
    for part in text.split(","):
        name = part.strip()
        field = name.startswith(JSON_FIELD)
        name = name if field else name.removeprefix(".").lower()
        if field and (parameter == "image" or not all(name.removeprefix(JSON_FIELD).split("."))):
            raise UserError(
                f"`{parameter}` {text!r}: {part!r} is no suffix; give `caption` json:FIELD, or json:OUTER.INNER"
            )
        if not name or name == JSON or (not field and (set(name) & set("/:\\ ") or name.endswith("."))):
            raise UserError(
                f"`{parameter}` {text!r}: {part!r} is no suffix of an {parameter}; give suffixes such as input.jpg, with commas "
                "(a caption in the JSON is json:FIELD)"
            )
        found.append(name)
    if len(set(found)) < len(found):
        raise UserError(f"`{parameter}` {text!r} names a suffix twice: give each once")
    return tuple(found)


def value_at(value: Any, field: str) -> Any:  # noqa: ANN401  (JSON values)
    """Return the value in a field of a JSON value; None if there is none. A name of digits is also a place in a list."""
    for name in field.split("."):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def text_at(value: Any, field: str) -> str | None:  # noqa: ANN401  (JSON values)
    """Return the text in a field of a JSON value, as `value_at`; None if there is no text."""
    found = value_at(value, field)
    return found if isinstance(found, str) else None


def json_caption(content: bytes, fields: tuple[str, ...]) -> bytes:
    """Return the caption in a sample's JSON, as an import has chosen it; raise an OSError if the JSON has none now."""
    try:
        value = json.loads(content)
        texts = [text for field in fields if (text := text_at(value, field)) is not None]
        return next((text for text in texts if text), texts[0]).encode()
    except (ValueError, RecursionError, LookupError) as error:  # ValueError: no JSON, or half a character
        raise OSError(
            f"its JSON has no caption in {', '.join(fields)}, as it had when it was imported ({error})"
        ) from error
