"""Who owns which block of the key/value memory. Block ids only: the memory itself belongs to the runner.

Memory is cut into blocks of `block_tokens` tokens (PagedAttention, Kwon et al. 2023, arXiv 2309.06180); a sequence has a table of them.
A block is in exactly one of three states:

    free    nobody refers to it and nothing can be found in it
    cached  nobody refers to it, but it is sealed: full, named by its prefix, and found again by `match_prefix`; evictable
    used    in `references` >= 1 tables, sealed or not

Free and cached blocks can be allocated, free ones first. Cached ones go least recently used first, and a table is released from its tail,
so of one prefix the far end goes first and a block is never evicted before those that continue it. That order is more than a good policy:
because the predecessor of a registered block is always registered too, a digest stands for one prefix at a time, even if sha256 collided.

Two sequences may compute the same prefix side by side. The first to seal a block registers it; the other keeps its own copy, a twin. A twin
is not found by anyone, but takes over when the registered copy is evicted while the twin is still in use.

Every operation is O(1) per block. Nothing here scales with the size of the pool but `check` and `forget`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Run

from gemel.engine import prefix
from gemel.engine.prefix import Sealed

EVICTED_MEMORY = 4  # digests of evicted blocks that are remembered, per block of the pool: enough to tell "evicted" from "cold"


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens. `salt` starts every hash chain: pools with different salts have no name in common.

    `prefix_hit_tokens` and `prefix_misses` count what `count_lookup` was told; see `EngineStats` for the reasons.
    """

    def __init__(self, num_blocks: int, block_tokens: int, prefix_cache: bool = True, salt: str = ""):
        assert num_blocks > 0 and block_tokens > 0, f"{num_blocks} blocks of {block_tokens} tokens"
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self.salt = salt
        self.prefix_hit_tokens = 0
        self.prefix_misses = {"cold": 0, "evicted": 0, "partial": 0, "off": 0}
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the likeliest to be in a processor's cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._sealed: list[Sealed | None] = [None] * num_blocks
        self._registered: dict[bytes, int] = {}
        self._twins: dict[bytes, list[int]] = {}
        self._evicted: OrderedDict[bytes, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to but that can still be found."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks in at least one table."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def references(self, block: int) -> int:
        """In how many tables the block is."""
        return self._references[block]

    def sealed_as(self, block: int) -> bytes | None:
        """The packed token ids of a sealed block, None for others."""
        entry = self._sealed[block]
        return None if entry is None else entry.packed

    def allocate(self) -> int:
        """A block for one table, with no content. The caller looks at `num_free` first."""
        if self._free:
            block = self._free.pop()
        else:
            assert self._cached, f"all {self.num_blocks} blocks are used"
            block, _ = self._cached.popitem(last=False)
            self._evict(block)
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Put used or cached blocks into one more table."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Run[int]) -> None:
        """Take a table's blocks out of it, given in the table's order."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released once too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._retire(block)

    def copy_on_write(self, block: int) -> int:
        """The block to write to instead of `block`: itself when one table has it, else a new one, which needs a copy of its content."""
        if self._references[block] == 1:
            assert self._sealed[block] is None, f"block {block} is full and sealed, it must not be written"
            return block
        to = self.allocate()
        self._references[block] -= 1
        return to

    def match_prefix(self, tokens: Run[int], salt: str = "") -> list[int]:
        """The longest chain of sealed blocks that `tokens` starts with, short of the last token, which is always computed.

        Takes no reference: `share` the blocks before anything is allocated.
        """
        matched: list[int] = []
        if not self.prefix_cache or not self._registered:
            return matched
        size = self.block_tokens
        parent = prefix.root(self.salt, salt)
        for depth in range((len(tokens) - 1) // size):
            packed = prefix.pack(tokens[depth * size : (depth + 1) * size])
            digest = prefix.link(parent, packed)
            block = self._find(digest, parent, depth, packed)
            if block is None:
                break
            matched.append(block)
            parent = digest
        return matched

    def count_lookup(self, tokens: Run[int], salt: str, matched: Run[int]) -> None:
        """Count the tokens of a prompt as hits and misses by reason, given the blocks that were matched (and are held) for it."""
        size = self.block_tokens
        if not self.prefix_cache:
            self.prefix_misses["off"] += len(tokens)
            return
        num_full = (len(tokens) - 1) // size
        self.prefix_hit_tokens += len(matched) * size
        self.prefix_misses["partial"] += len(tokens) - num_full * size
        digest = self._digest_after(matched, salt)
        for depth in range(len(matched), num_full):
            digest = prefix.link(digest, prefix.pack(tokens[depth * size : (depth + 1) * size]))
            if digest not in self._evicted:  # then nothing that continues it was cached either
                self.prefix_misses["cold"] += (num_full - depth) * size
                break
            self.prefix_misses["evicted"] += size

    def seal(self, blocks: Run[int], depth: int, tokens: Run[int], salt: str = "") -> None:
        """Name block `depth` of a table, now that it holds all of `tokens`, so that others find it."""
        if not self.prefix_cache:
            return
        block = blocks[depth]
        assert self._references[block] > 0 and self._sealed[block] is None and len(tokens) == self.block_tokens
        if depth and self._sealed[blocks[depth - 1]] is None:
            return  # the chain is broken by a collision before: no name of ours would tell this prefix from the other
        parent = self._digest_after(blocks[max(0, depth - 1) : depth], salt)
        packed = prefix.pack(tokens)
        digest = prefix.link(parent, packed)
        if digest not in self._registered:
            self._registered[digest] = block
            self._evicted.pop(digest, None)
        elif self._find(digest, parent, depth, packed) is None:
            return  # another content has this digest
        else:
            self._twins.setdefault(digest, []).append(block)
        self._sealed[block] = Sealed(digest, parent, depth, packed)

    def forget(self) -> None:
        """Empty the cache: nothing computed so far is ever found again. Used blocks stay with their tables."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._sealed = [None] * self.num_blocks
        self._registered.clear()
        self._twins.clear()
        self._evicted.clear()

    def check(self) -> None:
        """Assert every invariant named in the module's first lines. O(num_blocks)."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._references) if count > 0}
        assert min(self._references) >= 0, "negative reference count"
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & used or cached & used), "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is lost"
        assert all(self._sealed[block] is None for block in free), "a free block is sealed"
        twins = {block: digest for digest, blocks in self._twins.items() for block in blocks}
        assert all(self._twins.values()) and set(twins) <= used, "a twin is not in use"
        assert cached <= set(self._registered.values()), "a cached block cannot be found"
        named = {block: digest for digest, block in self._registered.items()}
        assert len(named) == len(self._registered) and not named.keys() & twins.keys(), "a block has two names"
        sealed = {block: entry.digest for block, entry in enumerate(self._sealed) if entry is not None}
        assert sealed == named | twins, "names and sealed blocks differ"
        assert not self._registered.keys() & self._evicted.keys(), "a registered block counts as evicted"
        self._check_order()

    def _check_order(self) -> None:
        """Every registered block's predecessor is registered, and stays so for longer."""
        age = {block: place for place, block in enumerate(self._cached)}
        for block in self._registered.values():
            entry = self._sealed[block]
            assert entry is not None
            if entry.depth == 0:
                continue
            assert entry.parent in self._registered, "a block outlived its predecessor"
            before = self._registered[entry.parent]
            if before in age and entry.parent not in self._twins:  # else it is in use, or would be replaced by a block that is
                assert block in age and age[before] > age[block], "a block would be evicted before one that continues it"

    def _find(self, digest: bytes, parent: bytes, depth: int, packed: bytes) -> int | None:
        block = self._registered.get(digest)
        if block is None:
            return None
        entry = self._sealed[block]
        assert entry is not None
        return block if entry.holds(parent, depth, packed) else None

    def _digest_after(self, blocks: Run[int], salt: str) -> bytes:
        """The digest that the block after these has as its parent."""
        if not blocks:
            return prefix.root(self.salt, salt)
        entry = self._sealed[blocks[-1]]
        assert entry is not None
        return entry.digest

    def _retire(self, block: int) -> None:
        """Nobody refers to the block any more: keep it if it can be found, else free it."""
        entry = self._sealed[block]
        if entry is None:
            self._free.append(block)
            return
        registered = self._registered[entry.digest]
        if registered == block:
            self._cached[block] = None
            return
        if registered in self._cached:
            self._cached.move_to_end(registered)  # what continues the twin was released just now and must not outlive the registered copy
        self._drop_twin(entry.digest, block)
        self._sealed[block] = None
        self._free.append(block)

    def _drop_twin(self, digest: bytes, block: int) -> None:
        twins = self._twins[digest]
        twins.remove(block)
        if not twins:
            del self._twins[digest]

    def _evict(self, block: int) -> None:
        """Make room: the block's content is lost, unless a twin still has it."""
        entry = self._sealed[block]
        assert entry is not None
        self._sealed[block] = None
        if entry.digest in self._twins:
            heir = self._twins[entry.digest][0]
            self._drop_twin(entry.digest, heir)
            self._registered[entry.digest] = heir
            return
        del self._registered[entry.digest]
        self._evicted[entry.digest] = None
        if len(self._evicted) > EVICTED_MEMORY * self.num_blocks:
            self._evicted.popitem(last=False)
