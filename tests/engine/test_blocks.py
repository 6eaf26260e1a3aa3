import pytest

from gemel.engine import prefix
from gemel.engine.blocks import EVICTED_MEMORY, BlockPool

SIZE = 4


def fill(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """A table with every full block of `tokens` computed and sealed, as the scheduler would leave it."""
    blocks = pool.match_prefix(tokens, salt)
    pool.share(blocks)
    for depth in range(len(blocks), len(tokens) // SIZE):
        blocks.append(pool.allocate())
        pool.seal(blocks, depth, tokens[depth * SIZE : (depth + 1) * SIZE], salt)
    if len(tokens) % SIZE:
        blocks.append(pool.allocate())
    pool.check()
    return blocks


def counts(pool: BlockPool) -> tuple[int, int, int]:
    """(never or no longer findable, cached, used)."""
    return pool.num_free - pool.num_cached, pool.num_cached, pool.num_used


def test_a_block_is_free_then_used_then_cached_or_free():
    pool = BlockPool(4, SIZE)
    assert counts(pool) == (4, 0, 0)
    blocks = fill(pool, list(range(6)))
    assert counts(pool) == (2, 0, 2)
    pool.release(blocks)
    assert counts(pool) == (3, 1, 0)  # the full block can be found, the partial one not
    pool.check()


def test_released_once_too_often_is_our_bug():
    pool = BlockPool(2, SIZE)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError, match="released once too often"):
        pool.release([block])


def test_allocating_from_an_exhausted_pool_is_our_bug():
    pool = BlockPool(1, SIZE)
    pool.allocate()
    with pytest.raises(AssertionError, match="all 1 blocks are used"):
        pool.allocate()


def test_a_prefix_is_found_in_full_blocks_short_of_the_last_token():
    pool = BlockPool(8, SIZE)
    blocks = fill(pool, list(range(12)))
    assert pool.match_prefix(list(range(13))) == blocks
    assert pool.match_prefix(list(range(12))) == blocks[:2]  # the last token is always computed, so its block is not shared
    assert pool.match_prefix([*range(8), 99, 99, 99, 99, 99]) == blocks[:2]
    assert (
        pool.match_prefix([*range(4), 99, 99, 99, 99, *range(8, 12), 0]) == blocks[:1]
    )  # equal blocks after a different one are different
    assert pool.match_prefix([99, *range(1, 12)]) == []
    assert pool.match_prefix([5]) == []


def test_matching_takes_no_reference_and_sharing_does():
    pool = BlockPool(4, SIZE)
    tokens = list(range(9))
    pool.release(fill(pool, tokens))
    matched = pool.match_prefix(tokens)
    assert len(matched) == 2 and counts(pool) == (2, 2, 0)
    pool.share(matched)
    pool.share(matched)
    assert counts(pool) == (2, 0, 2) and [pool.references(block) for block in matched] == [2, 2]
    pool.check()


def test_salts_of_requests_and_engines_keep_prefixes_apart():
    tokens = list(range(9))
    pool = BlockPool(8, SIZE, salt="engine")
    mine = fill(pool, tokens, "mine")
    assert pool.match_prefix(tokens, "mine") == mine[:2]
    assert pool.match_prefix(tokens, "yours") == pool.match_prefix(tokens, "") == []


def test_free_blocks_go_before_cached_ones():
    pool = BlockPool(3, SIZE)
    cached = fill(pool, list(range(4)))
    pool.release(cached)
    pool.allocate(), pool.allocate()
    assert pool.num_cached == 1 and pool.match_prefix(list(range(5))) == cached
    assert pool.allocate() == cached[0]
    assert pool.match_prefix(list(range(5))) == []
    pool.check()


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end():
    pool = BlockPool(6, SIZE)
    old, new = list(range(12)), list(range(100, 112))
    for tokens in (old, new):
        pool.release(fill(pool, tokens))
    gone = []
    for _ in range(6):
        pool.allocate()
        pool.check()
        gone.append((len(pool.match_prefix([*old, 0])), len(pool.match_prefix([*new, 0]))))
    assert gone == [(2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]


def test_a_hit_makes_a_prefix_recent():
    pool = BlockPool(4, SIZE)
    old, new = list(range(8)), list(range(100, 108))
    for tokens in (old, new, old):
        pool.release(fill(pool, tokens))
    pool.allocate(), pool.allocate()
    assert len(pool.match_prefix([*old, 0])) == 2 and pool.match_prefix([*new, 0]) == []


def test_a_write_to_a_shared_block_gets_a_new_one():
    pool = BlockPool(3, SIZE)
    block = pool.allocate()
    assert pool.copy_on_write(block) == block
    pool.share([block])
    other = pool.copy_on_write(block)
    assert other != block and pool.references(block) == pool.references(other) == 1
    assert pool.copy_on_write(block) == block  # alone again
    pool.check()


def test_a_sealed_block_is_never_written():
    pool = BlockPool(2, SIZE)
    (block,) = fill(pool, list(range(4)))
    with pytest.raises(AssertionError, match="must not be written"):
        pool.copy_on_write(block)


def test_two_that_compute_the_same_prefix_register_it_once():
    pool = BlockPool(8, SIZE)
    tokens = list(range(8))
    first, second = [pool.allocate(), pool.allocate()], [pool.allocate(), pool.allocate()]
    for depth in range(2):
        for blocks in (first, second):
            pool.seal(blocks, depth, tokens[depth * SIZE : (depth + 1) * SIZE])
    assert pool.match_prefix([*tokens, 0]) == first
    pool.check()
    pool.release(second)
    assert counts(pool) == (6, 0, 2)  # a twin is worth nothing beside the registered block
    pool.release(first)
    assert counts(pool) == (6, 2, 0)
    pool.check()


def test_a_twin_takes_over_when_the_registered_block_is_evicted():
    pool = BlockPool(3, SIZE)
    first, second = [pool.allocate()], [pool.allocate()]
    for blocks in (first, second):
        pool.seal(blocks, 0, [1, 2, 3, 4])
    second.append(pool.allocate())
    pool.seal(second, 1, [5, 6, 7, 8])  # continues the twin
    pool.release(first)
    assert pool.allocate() == first[0]
    pool.check()
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == second
    pool.release(second)
    pool.check()
    assert pool.num_cached == 2


def test_what_continues_a_twin_is_evicted_before_the_registered_block():
    pool = BlockPool(3, SIZE)
    first, second = [pool.allocate()], [pool.allocate()]
    for blocks in (first, second):
        pool.seal(blocks, 0, [1, 2, 3, 4])
    second.append(pool.allocate())
    pool.seal(second, 1, [5, 6, 7, 8])
    pool.release(first)
    pool.release(second)
    pool.check()
    pool.allocate(), pool.allocate()
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == first
    pool.check()


def test_misses_have_a_reason():
    pool = BlockPool(4, SIZE)
    tokens = list(range(14))
    pool.count_lookup(tokens, "", pool.match_prefix(tokens))
    assert pool.prefix_misses == {"cold": 12, "evicted": 0, "partial": 2, "off": 0}
    pool.release(fill(pool, tokens))
    held = [pool.allocate(), pool.allocate()]  # one free, then the end of the prefix
    matched = pool.match_prefix(tokens)
    assert len(matched) == 2
    pool.count_lookup(tokens, "", matched)
    assert pool.prefix_hit_tokens == 8
    assert pool.prefix_misses == {"cold": 12, "evicted": 4, "partial": 4, "off": 0}
    longer = [*range(12), 50, 51, 52, 53, 54]
    pool.count_lookup(longer, "", pool.match_prefix(longer))
    assert pool.prefix_hit_tokens == 16
    assert pool.prefix_misses == {"cold": 16, "evicted": 8, "partial": 5, "off": 0}
    pool.release(held)
    pool.check()


def test_the_memory_of_evicted_blocks_is_bounded():
    pool = BlockPool(1, SIZE)
    for first in range(EVICTED_MEMORY + 2):
        pool.release(fill(pool, [first, 0, 0, 0]))
    for first in range(EVICTED_MEMORY + 2):
        pool.count_lookup([first, 0, 0, 0, 0], "", pool.match_prefix([first, 0, 0, 0, 0]))
    hits = 1  # the last one is still there
    assert pool.prefix_misses["evicted"] == EVICTED_MEMORY * SIZE
    assert pool.prefix_misses["cold"] == (2 - hits) * SIZE


def test_switched_off_nothing_is_found_and_the_misses_say_so():
    pool = BlockPool(4, SIZE, prefix_cache=False)
    tokens = list(range(9))
    pool.release(fill(pool, tokens))
    assert pool.match_prefix(tokens) == [] and pool.num_cached == 0
    pool.count_lookup(tokens, "", [])
    assert pool.prefix_misses == {"cold": 0, "evicted": 0, "partial": 0, "off": 9} and pool.prefix_hit_tokens == 0


def test_forgetting_empties_the_cache_and_leaves_tables_alone():
    pool = BlockPool(6, SIZE)
    pool.release(fill(pool, list(range(100, 108))))
    blocks = fill(pool, list(range(8)))
    pool.forget()
    assert counts(pool) == (4, 0, 2) and pool.match_prefix([*range(8), 0]) == []
    pool.check()
    pool.release(blocks)
    assert counts(pool) == (6, 0, 0)


@pytest.mark.parametrize("digest", [b"same" * 8, None])
def test_colliding_hashes_are_not_believed(monkeypatch, digest):
    """With a hash that collides always, or for all first blocks, no lookup may return another content than it asked for."""
    real = prefix.link
    monkeypatch.setattr(prefix, "link", lambda parent, packed: digest or real(b"", packed[:1]))
    pool = BlockPool(12, SIZE)
    tables = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 5, 5, 6, 7, 8], [1, 1, 1, 1, 1, 1, 1, 1], [5, 6, 7, 8, 5, 6, 7, 8]]
    held: dict[int, tuple[int, ...]] = {}
    for tokens in tables:
        blocks = pool.match_prefix(tokens)
        pool.share(blocks)
        for depth in range(len(blocks), 2):
            blocks.append(pool.allocate())
            pool.seal(blocks, depth, tokens[depth * SIZE : (depth + 1) * SIZE])
            held[blocks[depth]] = tuple(tokens[: (depth + 1) * SIZE])
        for other in tables:
            for depth, block in enumerate(pool.match_prefix([*other, 0])):
                assert held[block] == tuple(other[: (depth + 1) * SIZE])
        pool.check()
    assert pool.match_prefix([*tables[0], 0])  # a collision costs hits, it does not switch the cache off
