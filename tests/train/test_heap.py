"""In processes of their own: what is set cannot be taken back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from gemel.config.errors import UnsupportedError
from gemel.train import heap

COUNT = """
import ctypes, torch
from gemel.train import heap

class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

count = ctypes.CDLL(None).mallinfo2
count.restype = Info
heap.apply({kind!r})
torch.ones(4_000_000)  # 16 MB come and go, so that the library would keep what is smaller in its heap
before = count().hblks
kept = [torch.ones(1_000_000) for _ in range(8)]
print(count().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc, or older than 2.33")
@pytest.mark.parametrize(("kind", "pages_of_their_own"), [("keep", 0), ("return", 8)])
def test_large_tensors_have_pages_of_their_own(kind: str, pages_of_their_own: int) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT.replace("{kind!r}", repr(kind))], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pages_of_their_own


def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    heap.apply("keep")
    with pytest.raises(UnsupportedError, match="heap = 'return' is a matter of glibc's malloc"):
        heap.apply("return")
