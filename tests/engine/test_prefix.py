import hashlib

from hypothesis import given
from hypothesis import strategies as st

from gemel.engine.prefix import Sealed, link, pack, root


def test_a_chain_is_sha256_over_parent_and_tokens():
    packed = b"".join(token.to_bytes(8, "little") for token in (1, 70000))
    assert pack([1, 70000]) == packed
    assert link(b"p" * 32, packed) == hashlib.sha256(b"p" * 32 + packed).digest()


@given(st.lists(st.integers(0, 2**40), max_size=5), st.lists(st.integers(0, 2**40), max_size=5))
def test_packing_keeps_runs_apart(a, b):
    assert (pack(a) == pack(b)) == (a == b)


@given(st.tuples(st.text(max_size=4), st.text(max_size=4)), st.tuples(st.text(max_size=4), st.text(max_size=4)))
def test_different_salts_give_different_roots(a, b):
    assert (root(*a) == root(*b)) == (a == b)


def test_moving_a_character_between_the_salts_changes_the_root():
    assert len({root("ab", "c"), root("a", "bc"), root("abc", ""), root("", "abc")}) == 4


def test_a_salt_may_hold_what_utf8_cannot():
    assert root("", "\ud800") != root("", "\ud801")


def test_a_hit_needs_parent_depth_and_tokens():
    entry = Sealed(b"d", b"p", 2, pack([1, 2]))
    assert entry.holds(b"p", 2, pack([1, 2]))
    assert not entry.holds(b"q", 2, pack([1, 2]))
    assert not entry.holds(b"p", 1, pack([1, 2]))
    assert not entry.holds(b"p", 2, pack([1, 3]))
