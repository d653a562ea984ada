"""YAML of recipes, read within bounds, because a few bytes of aliases in a foreign recipe can unfold to gigabytes."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from tailwise.errors import NotFoundError, UserError
from tailwise.text import is_unicode

MAX_BYTES = 256 * 1024  # of a file; tailwise's largest recipe has 3 KB
MAX_DEPTH = 50
MAX_DIGITS = 100  # of a whole number; Python refuses to print numbers of more than 4,300
MAX_NODES = 10_000  # values, with all aliases unfolded; 50 characters count as one more value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, which also refuses deep nesting, aliases that unfold too far, and duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.name = "the text"  # for the places in errors
        self._depth = self._unfolded = 0
        self._sizes: dict[int, int] = {}  # of each composed node, by id

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        """Compose one node, and count its values with all aliases unfolded."""
        mark = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        before, self._depth = self._unfolded, self._depth + 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"is nested deeper than {MAX_DEPTH} levels", mark)
        node: yaml.Node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(None, None, "an alias refers to the value that holds it", mark)
        own = 1 + (self._check(node) // 50 if isinstance(node, yaml.ScalarNode) else 0)
        self._unfolded += self._sizes[id(node)] if alias else own
        self._sizes.setdefault(id(node), self._unfolded - before)
        if self._unfolded > MAX_NODES:
            raise yaml.MarkedYAMLError(None, None, f"unfolds to more than {MAX_NODES:,} values", mark)
        return node

    @staticmethod
    def _check(node: yaml.ScalarNode) -> int:
        """Return the length of a value; refuse values that files, paths and messages cannot hold."""
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(None, None, f"holds a number of more than {MAX_DIGITS} digits", node.start_mark)
        if "\0" in node.value or not is_unicode(node.value):
            raise yaml.MarkedYAMLError(None, None, "holds a NUL or half a character", node.start_mark)
        return len(node.value)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping whose keys differ."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, object]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"has the key {key.value!r} twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str, where: str) -> Any:  # noqa: ANN401  (whatever YAML holds)
    """Return the value of a YAML text, or raise a UserError that names it by `where`: "recipe r.yaml"."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: dates and numbers that do not exist
        raise UserError(f"{where} can't be read: {error}") from error


def read_yaml(name: str, folder: Path) -> tuple[Path, Any]:
    """Return path and content of a recipe: the `name` of one in `folder`, or the path of a regular .yaml file of at most MAX_BYTES."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    remedy = f"give {', '.join(sorted(item.stem for item in folder.glob('*.yaml')))}, or the path of a .yaml file"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"recipe {path} is no regular file: {remedy}")
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"recipe {path} is larger than {MAX_BYTES:,} bytes, which is the bound: shorten it")
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no recipe {name!r}: {remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL
        raise UserError(f"recipe {path} can't be read: {error}") from error
    return path, parse_yaml(text, f"recipe {path}")
