import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.storage import delimited
from tailwise.storage.delimited import key_of, line_of, read_keys

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
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text("".join(f"{line_of(key)}\r\n" for key in listed), encoding=encoding, newline="")
        assert read_keys(path) == listed


@given(keys)
def test_a_line_is_one_line(key):
    line = line_of(key)
    assert line
    assert "\n" not in line
    assert "\r" not in line
    assert key_of(line, 1) == key


@pytest.mark.parametrize("key", ["000000001", "a b", 'say "hi"', "C:\\new\\t.jpg", "#1", "größe", " lead", "a\u2028b"])
def test_ordinary_keys_stand_as_they_are(key):
    assert line_of(key) == key


def test_empty_lines_are_passed_over_and_blank_ones_are_keys(tmp_path):
    (tmp_path / "keys.txt").write_bytes(b"a\n\n\r\n \nb")
    assert read_keys(tmp_path / "keys.txt") == ["a", " ", "b"]


@pytest.mark.parametrize("line", ['\\"', '\\"x', '\\"x" y', '\\""1'])
def test_a_damaged_escape_is_refused(tmp_path, line):
    (tmp_path / "keys.txt").write_text(f"a\n{line}\n")
    with pytest.raises(UserError, match=r"keys\.txt .*line 2 begins .*JSON"):
        read_keys(tmp_path / "keys.txt")


@pytest.mark.parametrize("content", [b"a\xff\n", "a\n".encode("utf-16-le"), b"x" * 101])
def test_other_encodings_and_long_lists_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(delimited.read_text, "__defaults__", (100,))
    (tmp_path / "keys.txt").write_bytes(content)
    with pytest.raises(
        UserError, match=r"can't be read as a list of keys: it (is not UTF-8|holds NUL|has a line of more than 100)"
    ):
        read_keys(tmp_path / "keys.txt")
