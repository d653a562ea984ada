"""Text tables: rows read = lines; a quote never swallows rows, and other encodings are refused in words."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise.storage.delimited import parse_json, read_rows, read_text


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("delimited") / "table.txt"


def rows(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [fields for _, fields in read_rows(path)]


def test_a_quote_in_tsv_is_a_character(path):
    assert rows(path, 'key\tnote\na\t"tv 40\nb\tx\nc\t40" tv"\n') == [
        ["key", "note"], ["a", '"tv 40'], ["b", "x"], ["c", '40" tv"'],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('key,note\na,"tv 40\nb,x\n', "line 2"),
        ('key,note\na,x\nb,"tv 40\nc,tv 40"\n', "line 3"),  # the second quote would close the first
        ('key,note\na,x\nb,"tv 40', "line 3"),
        ('key,"note\na,x\n', "line 1"),
        ('key,note\na,"x"y\n', "line 2"),
        ("key,note\na,x,y\n", "line 2"),
        ("key\tnote\na\n", "line 2"),
        ("key,note\n\na\n", "line 3"),
    ],
)
def test_rows_that_can_not_be_told_apart_are_refused_with_their_line(path, content, line):
    with pytest.raises(ValueError, match=f"^{line} has"):
        rows(path, content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_breaks(path, encoding, end):
    assert rows(path, f"key,note{end}é\u2028,\x85{end}{end}".encode(encoding)) == [["key", "note"], ["é\u2028", "\x85"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("key,note\né,x\n".encode("latin-1"), "not UTF-8 text"),
        ("key,note\n".encode("utf-16-le"), "UTF-16 without byte order mark"),
        (b"\xff\xfek", "not UTF-16 text"),
        (b"\xff\xfe\x00\x00k\x00\x00\x00", "NUL characters"),
    ],
)
def test_other_encodings_are_refused(path, content, message):
    for read in (rows, lambda path, content: path.write_bytes(content) and read_text(path)):
        with pytest.raises(ValueError, match=message):
            read(path, content)


fields = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0\t"), max_size=8)


@given(st.integers(2, 4).flatmap(lambda width: st.lists(st.lists(fields, min_size=width, max_size=width), min_size=1)))
def test_rows_read_are_the_lines_written(path, table):
    stream = io.StringIO()
    csv.writer(stream).writerows(table)
    assert rows(path, stream.getvalue()) == table
    assert rows(path, "".join("\t".join(row) + "\n" for row in table)) == table


@given(st.text(st.sampled_from('a",\n'), max_size=40))
def test_no_line_is_swallowed(path, text):
    try:
        found = rows(path, text)
    except ValueError:
        return
    assert len(found) == sum(bool(line) for line in text.split("\n"))


@pytest.mark.parametrize("text", ["[" * 200_000 + "]" * 200_000, "1" * 5000, "{", ""])
def test_json_that_can_not_be_read_is_one_kind_of_error(text):
    with pytest.raises(ValueError):
        parse_json(text)
