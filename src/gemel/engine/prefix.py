"""The hash chain that names a block by everything before it.

Keys and values at a position depend on every token up to it, so a block is only worth its content together with its whole prefix. Its name
is the digest of (name of the block before, its own token ids), and the first block's "block before" is a root made of the salts.

The hash is sha256: Python's own hash is predictable, and with a predictable hash one user can craft a prompt that collides with another's
(GHSA-rm76-4mrf-v9r8). It is still only an index: `Sealed.holds` compares what was hashed before a hit is believed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Run
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a full block holds. `parent` is the digest of the block before it, `depth` its place in the chain, `packed` its token ids."""

    digest: bytes
    parent: bytes
    depth: int
    packed: bytes

    def holds(self, parent: bytes, depth: int, packed: bytes) -> bool:
        """True when the content is really the one looked for and not merely one with the same digest."""
        return self.packed == packed and self.depth == depth and self.parent == parent


def root(engine_salt: str, request_salt: str) -> bytes:
    """Where a chain starts. Lengths go first, so ("ab", "c") and ("a", "bc") start apart; salts may hold any text, lone surrogates too."""
    state = sha256(b"gemel prefix root")
    for salt in (engine_salt, request_salt):
        text = salt.encode("utf-8", "surrogatepass")
        state.update(len(text).to_bytes(8, "little"))
        state.update(text)
    return state.digest()


def link(parent: bytes, packed: bytes) -> bytes:
    """The digest of a block whose predecessor is `parent`."""
    return sha256(parent + packed).digest()


def pack(tokens: Run[int]) -> bytes:
    """Token ids as 8 bytes each: fixed width, so that no two runs of tokens look the same."""
    return array("q", tokens).tobytes()
