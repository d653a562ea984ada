import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailwise.catalog.key_text import key_of, line_of, read_keys
from tailwise.errors import UserError

keys = st.text(st.characters(exclude_categories=["Cs"]))
ODD = [
    "",
    " ",
    " lead",
    "trail ",
    "\t",
    "#x",
    '"x"',
    '\\"x"',
    "\\n",
    "a\\",
    "\ufeffx",
    "\r",
    "x\r",
    "a\nb",
    "\x85",
    "\u2028",
    "\x1c",
    "\0",
]


@given(st.lists(keys))
@example(ODD)
def test_any_keys_written_and_read_are_themselves(tmp_path_factory, listed):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("".join(f"{line_of(key)}\n" for key in listed), encoding="utf-8", newline="")
    assert read_keys(path) == listed
    path.write_text("".join(f"{line_of(key)}\r\n" for key in listed), encoding="utf-8-sig", newline="")
    assert read_keys(path) == listed


@given(keys)
def test_a_line_is_one_line(key):
    line = line_of(key)
    assert line
    assert "\n" not in line
    assert "\r" not in line
    assert key_of(line) == key


@pytest.mark.parametrize("key", ["000000001", "a b", 'say "hi"', "C:\\new\\t.jpg", "#1", "größe", " lead", "a\u2028b"])
def test_ordinary_keys_stand_as_they_are(key):
    assert line_of(key) == key


def test_empty_lines_are_passed_over_and_blank_ones_are_keys(tmp_path):
    (tmp_path / "keys.txt").write_bytes(b"a\n\n\r\n \nb")
    assert read_keys(tmp_path / "keys.txt") == ["a", " ", "b"]


@pytest.mark.parametrize("line", ['\\"', '\\"x', '\\"x" y', '\\""1'])
def test_a_damaged_escape_is_refused(tmp_path, line):
    (tmp_path / "keys.txt").write_text(f"a\n{line}\n")
    with pytest.raises(UserError, match=r"line 2 of .*JSON"):
        read_keys(tmp_path / "keys.txt")


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "keys.txt").write_text("a\n", encoding="utf-16")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_keys(tmp_path / "keys.txt")
