"""Evaluation sets: the layout behind a path or URL, its shards, and the names of its classes."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Literal, get_args

from braceexpand import braceexpand

from tailwise.errors import NotFoundError, UserError
from tailwise.evaluate.images import FileShard, Shard, TarShard, reading
from tailwise.shards.parquet_images import class_names, has_images
from tailwise.storage.delimited import read_text
from tailwise.storage.remote import forget_failures

Task = Literal["classification", "retrieval"]
TASKS = get_args(Task)
# Those of torchvision's ImageFolder.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
FILES_A_SHARD = 1024
FIELDS = frozenset({"c", "", "0"})  # allowed in templates
MAX_TEMPLATES = 1_000  # embedded together
MAX_PROMPTS = 10_000_000  # classes × templates
MAX_LINE = 1_000  # characters of a class name or a template; models read 77 tokens
MAX_TARS = 1_000_000
SPLITS = frozenset({"test", "val", "validation"})
_WORDNET = re.compile(r"n\d{8}")
_HUGGING_FACE = re.compile(r"(https://huggingface\.co/datasets/[^/]+/[^/]+)/(?:tree|resolve|raw)/([^/]+)/?")


@dataclass(frozen=True)
class ImageSet:
    """One set to evaluate on."""

    name: str  # name in messages and file names
    task: Task  # "classification" or "retrieval"
    shards: tuple[Shard, ...]  # the images
    classes: tuple[str, ...] = ()  # class names by index; empty for retrieval
    templates: tuple[str, ...] = ()  # prompts with `{c}` for the class; empty for open_clip's 80 of ImageNet
    metric: str | None = None  # official metric, a name in `suites.METRICS`; None for a set of no suite
    ignored_group: int | None = None  # group of images that "worst_group_…" leaves out


def find_set(data: str, classes: Path | None = None, templates: Path | None = None) -> ImageSet:
    """Return the set of a path, glob, brace pattern or URL, or raise a UserError if there is none, or its files do not match.

    `data` is a folder or URL in clip_benchmark's webdataset layout; a folder of tars, or tars, with `.cls`; Parquet files with images and a
    column `cls`, `label` or `class_index`; or a folder with a folder of images for each class, in the order of their sorted names. Files of
    class names and of prompts, one a line, replace the set's own.
    """
    root, tars = _find_tars(data)
    return _tars(tars, root, classes, templates) if tars else _folders(root, classes, templates)


def find_images(data: str) -> tuple[str, tuple[Shard, ...]]:
    """Return name and images of a set as of `find_set`, where targets and class names may be missing, or of any folder of images."""
    root, tars = _find_tars(data)
    # targets of tars may be missing
    found = tuple(TarShard(path, () if path.endswith(".parquet") else ("cls",)) for path in tars)
    files = [] if tars else [(str(path), 0) for path in _image_files(Path(root))]
    if not tars and not files:
        raise UserError(f"{root} holds no images: give a folder of images, tars, or Parquet files")
    return set_name(root), found or _file_shards(files)


def _find_tars(data: str) -> tuple[str, list[str]]:
    """Return the root of a set and its tars; none of a folder of images."""
    forget_failures()
    remote = "://" in data
    root = _resolvable(data).rstrip("/") if remote else str(Path(data).expanduser())
    if (lines := _read_lines(f"{root}/test/nshards.txt", optional=True)) is not None:  # clip_benchmark's layout
        count = " ".join(lines)
        if not re.fullmatch("[0-9]{1,9}", count) or not 1 <= int(count) <= MAX_TARS:
            raise UserError(f"{root}/test/nshards.txt says {count!r}: must be the number of tars, 1 to {MAX_TARS:,}")
        return root, [f"{root}/test/{number}.tar" for number in range(int(count))]
    if not remote and Path(root).is_dir():
        tables = [path for path in Path(root).glob("*.parquet") if has_images(str(path), unreadable=True)]
        files = [*Path(root).glob("*.tar")] or tables  # a damaged table is an error when it is read
        return root, [str(path) for path in sorted(files, key=lambda path: (len(path.name), path.name))]
    patterns = list(braceexpand(root))
    tars_found = patterns if remote else [name for pattern in patterns for name in sorted(glob.glob(pattern))]  # noqa: PTH207
    if not tars_found or not all(name.endswith((".tar", ".parquet")) for name in tars_found):
        allowed = (
            "a folder with test/nshards.txt (as clip_benchmark's), tars with .cls, Parquet files, or folders of images"
        )
        raise UserError(f"{data} is no set: give {allowed}")
    return str(root).rsplit("/", 1)[0], tars_found


def _image_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]


def _file_shards(files: Sequence[tuple[str, int]]) -> tuple[Shard, ...]:
    return tuple(FileShard(tuple(files[at : at + FILES_A_SHARD])) for at in range(0, len(files), FILES_A_SHARD))


def _tars(tars: Sequence[str], root: str, classes: Path | None, templates: Path | None) -> ImageSet:
    kind = (_read_lines(f"{root}/dataset_type.txt", optional=True) or ["classification"])[0].lower()
    if kind not in TASKS:
        raise UserError(f"{root}/dataset_type.txt says {kind!r}: only {' and '.join(TASKS)} sets can be evaluated")
    if kind == "retrieval":
        return ImageSet(set_name(root), "retrieval", tuple(TarShard(path, ("txt",)) for path in tars))
    names = _names(root, classes) or (class_names(tars[0]) if tars[0].endswith(".parquet") else None)
    if names is None:
        raise NotFoundError(f"{root} has no classnames.txt: give `classes` FILE, one name a line, by class index")
    shards = tuple(TarShard(path, ("cls",)) for path in tars)
    return ImageSet(set_name(root), "classification", shards, names, _prompts(root, templates, len(names)))


def _folders(root: str, classes: Path | None, templates: Path | None) -> ImageSet:
    folders = sorted(path for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [(str(path), label) for label, folder in enumerate(folders) for path in _image_files(folder)]
    if not files:
        needed = "a folder with a folder of images for each class, or a set of tars"
        raise UserError(f"{root} holds no images: give {needed}")
    names = _names(root, classes)
    if names is None:
        if all(_WORDNET.fullmatch(folder.name) for folder in folders):
            remedy = "give `classes` FILE, one name a line, in their sorted order"
            raise UserError(f"the folders of {root} are WordNet ids: {remedy}")
        names = tuple(folder.name.replace("_", " ") for folder in folders)
    if len(names) != len(folders):
        counts = f"{len(names):,} class names for the {len(folders):,} folders"
        raise UserError(f"{counts} of {root}: give one name a folder")
    return ImageSet(set_name(root), "classification", _file_shards(files), names, _prompts(root, templates, len(names)))


def _refuse_long(path: str, lines: Sequence[str]) -> None:
    longest = max(lines, key=len, default="")
    if len(longest) > MAX_LINE:
        line = f"a line of {len(longest):,} characters, {longest[:80]!r} …"
        raise UserError(f"{path} has {line}: at most {MAX_LINE:,} are read; shorten it")


def _names(root: str, classes: Path | None) -> tuple[str, ...] | None:
    path = f"{root}/classnames.txt" if classes is None else str(classes)
    names = _read_lines(path, optional=classes is None)
    if names is None:
        return None
    if not names or not all(names):
        raise UserError(f"{path} has an empty line or none at all: give the name of a class in each line")
    _refuse_long(path, names)
    return tuple(names)


def _prompts(root: str, templates: Path | None, classes: int) -> tuple[str, ...]:
    path = f"{root}/zeroshot_classification_templates.txt" if templates is None else str(templates)
    prompts = _read_lines(path, optional=templates is None)
    if prompts is None:
        return ()
    _refuse_long(path, prompts)
    for prompt in prompts:
        fill(prompt, "cat", path)
    if not prompts:
        raise UserError(f"{path} is empty: give a template a line, with {{c}} for the class")
    if len(prompts) > MAX_TEMPLATES or classes * len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{path} holds {len(prompts):,} templates for {classes:,} classes: at most {MAX_TEMPLATES:,} templates and "
            f"{MAX_PROMPTS:,} prompts are allowed; give fewer"
        )
    return tuple(prompts)


def fill(template: str, name: str, path: str = "a template") -> str:
    """Return a template with the name of a class instead of `{c}` or `{}`.

    `str.format` is not used, because a template comes with a set, and could ask for gigabytes (`{c:>1500000000}`) or for attributes. Raise
    a UserError if it has neither, or other braces.
    """
    problem = f"{path} holds {template!r}: use {{c}} for the class"
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{problem}, and no other braces") from error
    if any(field is not None and (field not in FIELDS or spec or how) for _, field, spec, how in pieces):
        raise UserError(f"{problem}, and no other braces")
    if all(field is None for _, field, _, _ in pieces):
        raise UserError(problem)
    return "".join(literal + ("" if field is None else name) for literal, field, _, _ in pieces)


def set_name(root: str) -> str:
    """Return the last part of a path or URL; with the part before it if the last one is the name of a split."""
    match = _HUGGING_FACE.match(root)
    place = match[1] if match else root if "://" in root else str(Path(root).absolute())
    parts = [part for part in place.split("/") if part]
    own = parts[-1]
    return f"{parts[-2]}-{own}" if own in SPLITS and len(parts) > 1 else own


def _resolvable(url: str) -> str:
    """Return the address of the files for the page of a Hugging Face data set, which clip_benchmark's users give."""
    return _HUGGING_FACE.sub(r"\1/resolve/\2", url)


def _read_lines(path: str, *, optional: bool = False) -> list[str] | None:
    """Return the stripped lines of a text file or URL, without blank ones at the end; None if an optional file is missing."""
    try:
        with reading(path):
            text = read_text(path)
    except UserError as error:
        if optional and isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise
    return [line.strip() for line in text.rstrip().splitlines()]  # as clip_benchmark
