from hypothesis import given
from hypothesis import strategies as st

from tailwise.storage.lru import LRUCache


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 4))
def test_it_holds_the_latest_used(asked, most):
    recent: LRUCache[int, str] = LRUCache(most)
    expected, made = [], []
    for key in asked:
        before = len(made)
        assert recent.get(key, lambda key=key: made.append(key) or str(key)) == str(key)
        assert made[before:] == ([] if key in expected else [key])
        expected = [*(other for other in expected if other != key), key][-most:]
        assert recent.values() == [str(other) for other in expected]
        assert len(recent.values()) == len(expected)
    recent.clear()
    assert recent.values() == []


def test_there_is_room_for_what_is_made():
    recent: LRUCache[int, int] = LRUCache(3)
    for key in range(6):
        recent.get(key, lambda: len(recent.values()))
    assert recent.values() == [2, 2, 2]  # others held while each was made


def test_what_could_not_be_made_is_asked_for_again():
    recent: LRUCache[str, int | None] = LRUCache(2)
    answers = iter([None, 7])
    assert recent.get("a", lambda: next(answers)) is None
    assert len(recent.values()) == 0
    assert recent.get("a", lambda: next(answers)) == 7
    assert recent.get("a", lambda: 8) == 7
