"""What becomes of a large tensor's memory on a CPU when nobody needs it any more.

The C library's heap keeps it for the next tensor, which is quick. But what lives from the forward to the backward pass lies between what
does not, and a hole that is a little too small stays empty: a fifth of the memory of a step was holes. The other way is to give each
tensor pages of its own, which go back to the system at once; then the system has to zero new ones for the next.
"""

from __future__ import annotations

import ctypes

from gemel.config.compute import Heap
from gemel.config.errors import UnsupportedError

LARGE_BYTES = 2**20
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3); once it is set, the library no longer moves it by itself


def apply(heap: Heap) -> None:
    """For this process, from now on; nothing takes it back. `UnsupportedError` where the C library cannot."""
    if heap == "keep":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_MMAP_THRESHOLD, LARGE_BYTES):
        raise UnsupportedError("heap = 'return' is a matter of glibc's malloc, and this system has another; set heap = 'keep'")
