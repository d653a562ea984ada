import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.text import enumerated, plain


def test_what_a_terminal_would_obey_is_escaped():
    assert plain("a\x1b[31mred\x07") == "a\\x1b[31mred\\x07"
    assert plain("two\nlines\tand\u2028three") == "two\\nlines\\tand\\u2028three"
    assert plain("gpj\u202e.exe") == "gpj\\u202e.exe"
    assert plain("caf\udce9") == "caf\\udce9"
    assert plain("\x9b31m") == "\\x9b31m"


def test_readable_text_is_unchanged():
    for text in ("größe 3 μm", "日本\u3000語", "no\u00a0break", "👩\u200d🔬", "[/b] $x^2$ =1+1 \\x1b"):
        assert plain(text) == text
    assert plain(b"x") == "b'x'"


@given(st.text())
def test_nothing_unsafe_is_left(text):
    shown = plain(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in shown)
    assert plain(shown) == shown


def test_errors_are_one_safe_line():
    assert str(UserError("no key 'a\x1b[0m'\nhere")) == "no key 'a\\x1b[0m' here"


def test_many_names_are_shortened():
    names = [f"plan-{number}" for number in range(2000)]
    assert enumerated([]) == "none"
    assert enumerated(names[:2]) == "plan-0, plan-1"
    assert enumerated(names).endswith("plan-11 and 1,988 more")
