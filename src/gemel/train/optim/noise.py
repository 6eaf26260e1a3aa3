"""Random numbers for stochastic rounding: a pure function of a key and a place, with no generator whose state would have to be saved.

Step 7,000 of a resumed run draws the bits that step 7,000 of an uninterrupted one would have drawn. A table of hashed integers is made
once; a draw mixes it with two words of the key, (table ^ a) * b with b odd, and takes the upper bits (multiply-shift hashing,
Dietzfelbinger et al. 1997). For one element over many steps that is uniform, because a and b are; for neighbours within a step it is close
to independent. Three passes of integer arithmetic are cheaper than a generator that has to be seeded for every tensor, and every device
computes the same bits.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from gemel.ops.adamw import mixed

TABLE = 2**18  # elements that one draw can fill; its four bytes each stay in a cache of the second level


def key(*parts: int | str) -> int:
    """64 bits that depend on all parts and their order."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def sixteen_bits(key: int, num: int, device: torch.device, offset: int = 0) -> Tensor:
    """`num` integers (int32) uniform in [0, 2**16), those from `offset` on of the `TABLE` that belong to a key."""
    first, second = mixed(key)
    return table(device)[offset : offset + num].bitwise_xor(first).mul_(second).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


@functools.cache
def table(device: torch.device) -> Tensor:
    """`TABLE` hashed integers (int32), of which draws are made.

    Two rounds of the 32-bit finalizer of MurmurHash3 (Appleby 2011), in int64 so that shifts bring in zeros.
    """
    x = torch.arange(1, TABLE + 1, dtype=torch.int64)
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        x ^= x >> 16
    return (x - ((x >> 31) << 32)).to(torch.int32).to(device)
