"""What is written tensor by tensor is, byte for byte, what the library writes at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from gemel.model.tensor_file import CODES, Entry, TensorFile, in_order


@pytest.mark.parametrize("metadata", [None, {"format": 'ä"\\'}])
def test_the_bytes_are_the_librarys(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    """Of all types, with names and shapes that are unusual; whatever the order in which tensors come, and strided ones."""
    torch.manual_seed(0)
    tensors = {f"{i}.{dtype}": (torch.randn(3, i) * 9).to(dtype) for i, dtype in enumerate(CODES)}
    tensors |= {"strided": torch.randn(4, 6)[:, ::2].t(), "number": torch.tensor(7), "ö/@0,0": torch.zeros(0, 3), "b": torch.randn(1, 2, 3)}
    entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
    with TensorFile(tmp_path / "a", entries, metadata) as file:
        for name, tensor in reversed(tensors.items()):
            file.put(name, tensor)
    assert (tmp_path / "a").read_bytes() == save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    assert sum(entry.num_bytes for entry in entries) == sum(tensor.nbytes for tensor in tensors.values())


def test_order_is_that_of_the_file(tmp_path: Path) -> None:
    entries = in_order([Entry("b", (2,), torch.int8), Entry("a", (2,), torch.bfloat16), Entry("c", (), torch.int64)])
    assert [entry.name for entry in entries] == ["c", "a", "b"]
    with TensorFile(tmp_path / "a", entries) as file:
        for entry in entries:
            file.put(entry.name, torch.ones(entry.shape, dtype=entry.dtype))
    assert (tmp_path / "a").read_bytes().endswith((1).to_bytes(8, "little") + b"\x80\x3f\x80\x3f\x01\x01")


def test_what_was_announced_must_come(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="were announced and never came"), TensorFile(tmp_path / "a", [Entry("a", (1,), torch.int8)]):
        pass
    with pytest.raises(AssertionError, match="not what was announced"), TensorFile(tmp_path / "a", [Entry("a", (1,), torch.int8)]) as file:
        file.put("a", torch.ones(1))
