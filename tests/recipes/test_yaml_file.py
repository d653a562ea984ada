"""YAML of recipes: what is read, and what is refused within a moment and little memory."""

import os
import time

import pytest

from tailwise.compare.recipe import load_compare_recipe
from tailwise.errors import UserError
from tailwise.pipeline.steps import load_pipeline
from tailwise.recipes import load_recipe
from tailwise.recipes.recipe import MAX_BYTES, MAX_NODES, parse_yaml, read_yaml

LOADERS = (load_pipeline, load_recipe, load_compare_recipe)
LAUGHS = "\n".join(["- &a0 [x,x,x,x,x,x,x,x,x]", *(f"- &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))])
REFUSED = {
    "aliases": (LAUGHS, "unfolds to more than 10,000 values"),
    "aliases of a long text": (f"- &s '{'{folder}' * 5000}'\n" + "- *s\n" * 200, "unfolds to more than"),
    "a chain of aliases": ("- &a0 x\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 2000)), "unfolds to more"),
    "many values": ("- x\n" * (MAX_NODES + 1), "unfolds to more than"),
    "merged aliases": ("a: &a {k: &b [" + "x," * 5000 + "]}\nb: {<<: *a}\nc: {<<: *a}\n", "unfolds to more than"),
    "deep lists": ("[" * 5000 + "]" * 5000, "nested deeper than 50"),
    "deep mappings": ("{a: " * 5000, "nested deeper than 50"),
    "deep blocks": ("- " * 5000, "nested deeper than 50"),
    "deep keys": ("? " * 5000, "nested deeper than 50"),
    "itself": ("a: &a\n  b: *a\n", "refers to the value that holds it"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "has the key 'a' twice in .* line 3"),
    "a deeper key twice": ("a: {b: 1, 'b': 2}\n", "has the key 'b' twice"),
    "code": ("a: !!python/object/apply:os.system ['touch ran']\n", "could not determine a constructor"),
    "NUL": ("a: b\0\n", "#x0000"),
    "tab": ("a:\n\tb: c\n", "found character '\\\\t'"),
    "two documents": ("a: 1\n---\na: 2\n", "expected a single document"),
    "no such day": ("a: 2024-99-99\n", "month must be in"),
    "a number of 10,000 digits": ("a: " + "9" * 10_000 + "\n", "more than 100 digits"),
    "a hexadecimal number": ("a: 0x" + "f" * 10_000 + "\n", "more than 100 digits"),
    "an escaped NUL": ('a: "b\\0"\n', "holds a NUL"),
    "half a character": ('a: "b\\ud800"\n', "half a character"),
    "a list as a key": ("? [a]\n: b\n", "unhashable"),
    "a long tag": ("!<" + "x" * 100_000 + "> a", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_short_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = REFUSED[name]
    begin = time.process_time()
    with pytest.raises(UserError, match=message) as found:
        parse_yaml(text, "recipe r.yaml")
    assert time.process_time() - begin < 10  # a second or two on an idle machine
    assert str(found.value).startswith("recipe r.yaml can't be read: ")
    assert len(str(found.value)) < 5000
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_every_reader_of_recipes_has_the_same_bounds(load, tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in REFUSED.values():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load(str(path))


@pytest.mark.parametrize("load", LOADERS)
def test_what_is_no_recipe_file(load, tmp_path):
    path = tmp_path / "r.yaml"
    with pytest.raises(UserError, match="there is no recipe"):
        load(str(path))
    path.mkdir()
    with pytest.raises(UserError, match="is no regular file"):
        load(str(path))
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is no regular file"):
        load(str(path))
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is no regular file"):
        load(str(path))
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError, match="can't be read"):
        load(str(path))
    path.unlink()
    path.write_bytes("größe: 1".encode("utf-16"))
    with pytest.raises(UserError, match="codec can't decode"):
        load(str(path))
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match="larger than 262,144 bytes"):
        load(str(path))


def test_aliases_and_merges_within_the_bounds_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("\ufeffa: &a {b: 1, c: &c [2, 2]}\nd: {<<: *a, b: 3}\ne: [*a, *c]\n", encoding="utf-8")
    assert read_yaml(str(path), tmp_path)[1] == {
        "a": {"b": 1, "c": [2, 2]},
        "d": {"b": 3, "c": [2, 2]},
        "e": [{"b": 1, "c": [2, 2]}, [2, 2]],
    }
    assert parse_yaml("x: {y: &b {<<: &c {k: 0}, k: 1}}\na: {<<: *b}", "t")["x"] == {"y": {"k": 1}}


def test_settings_have_the_same_bounds():
    for text in ("[" * 5000, "9" * 10_000, "{a: 1, a: 2}"):
        with pytest.raises(UserError, match="can't be read"):
            load_compare_recipe("tinyimagenet-lt", [f"train={text}"])
