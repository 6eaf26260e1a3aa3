"""Pieces make up wholes again, whatever was cut and whatever is asked for; checked against plain indexing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemel.config.errors import CheckpointError
from gemel.model import build, pieces
from gemel.model.pieces import Pieces, Share, everything, run
from gemel.model.shard import Box
from tests import tiny


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 1), (1, 6), (3, 2, 4)])
def test_a_run_of_elements_is_some_boxes(shape: tuple[int, ...]) -> None:
    """Any run through any two boxes that lie one behind the other: every element, once, in order, in few boxes."""
    whole = torch.arange(2 * torch.Size(shape).numel()).view(2, *shape)
    both = [(slice(i, i + 1), *everything(shape)) for i in range(2)]
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            boxes = list(run(both, start, stop))
            assert [x for box in boxes for x in whole[box].reshape(-1).tolist()] == list(range(start, stop))
            assert len(boxes) <= 2 * max(2 * len(shape) - 1, 1) and all(pieces.size(box) for box in boxes)


def cut(shape: tuple[int, ...], rng: random.Random) -> list[Box]:
    """A whole as boxes that do not overlap."""
    boxes = [everything(shape)]
    for _ in range(4):
        box = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(shape))
        middle = rng.randint(box[axis].start, box[axis].stop)
        boxes += [(*box[:axis], part, *box[axis + 1 :]) for part in (slice(box[axis].start, middle), slice(middle, box[axis].stop))]
    return [box for box in boxes if pieces.size(box)]


@pytest.mark.parametrize("stored", [False, True])
def test_any_boxes_are_read_from_any_pieces(stored: bool, tmp_path: Path) -> None:
    """From memory, and from files of several ranks."""
    rng = random.Random(0)
    for number in range(20):
        whole = torch.randn(rng.randint(1, 9), rng.randint(1, 9), generator=torch.Generator().manual_seed(number))
        boxes, shares = cut((*whole.shape,), rng), [Share(), Share()]
        for rank, share in enumerate(shares):
            mine = boxes[rank::2]
            share["a.b"] = Pieces.of(torch.cat([whole[box].reshape(-1) for box in mine] or [whole[:0].view(-1)]), whole.shape, mine)
        found = shares[0].join(shares[1])
        if stored:
            for rank, share in enumerate(shares):
                pieces.write(tmp_path / f"{number}.{rank}", Share(share | {f"n{rank}": Pieces.of(torch.tensor(rank))}))
            index = json.loads(json.dumps(pieces.index(tmp_path, [f"{number}.0", f"{number}.1"])))
            found = pieces.find(tmp_path, index)
            assert [found[f"n{rank}"].whole().item() for rank in range(2)] == [0, 1]
        found.check()
        assert torch.equal(found["a.b"].whole(), whole)
        wanted = cut((*whole.shape,), rng)
        assert torch.equal(found["a.b"].read(wanted), torch.cat([whole[box].reshape(-1) for box in wanted]))


def test_what_is_missing_or_twice_there_is_named() -> None:
    half = Pieces.of(torch.ones(2), (4,), [(slice(0, 2),)])
    with pytest.raises(CheckpointError, match="x has 4 elements, and the ranks have 2 of it"):
        Share(x=half).check()
    with pytest.raises(CheckpointError, match=r"2 elements of a tensor of \[4\] are not there"):
        half.whole()
    with pytest.raises(CheckpointError, match="x has 4 elements, and the ranks have 6 of it"):
        Share(x=half).join(Share(x=half)).join(Share(x=half)).check()


def test_names_in_files_say_where(tmp_path: Path) -> None:
    share = Share(a=Pieces.of(torch.arange(4.0), (4, 2), [(slice(2, 4), slice(0, 2))]), b=Pieces.of(torch.tensor(3)))
    pieces.write(tmp_path / "x", share)
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "x").items()} == {"a@2,0": [[0, 1], [2, 3]], "b@": 3}


@pytest.mark.parametrize("kind", ["gqa", "mqa", "learned", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_read_in_pieces(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As `load` reads it, also where several tensors of a checkpoint lie in one of ours, or its rows in another order."""
    build.save(tiny.build(kind, **({"ffn_width": 128} if kind == "alibi" else {})), tmp_path / "m")
    whole, (laid_out, weights) = build.load(tmp_path / "m", dtype), build.lay_out(tmp_path / "m", dtype)
    assert all(p.is_meta and p.dtype == dtype for p in laid_out.model.parameters())
    assert (laid_out.config, laid_out.eos_token_ids, laid_out.stored) == (whole.config, whole.eos_token_ids, whole.stored)
    rng = random.Random(0)
    for name, want in whole.model.named_parameters():
        boxes = cut((*want.shape,), rng)
        assert torch.equal(weights[name].read(boxes), torch.cat([want.detach()[box].reshape(-1) for box in boxes]))
    build.allocate(laid_out.model, torch.device("cpu"))
    assert {name: p.shape for name, p in laid_out.model.named_parameters()} == {name: p.shape for name, p in whole.model.named_parameters()}
    assert (laid_out.model.head.weight is laid_out.model.embed.weight) == whole.config.tied_head


def test_numbers_that_are_not_finite_are_refused_where_they_are_read(tmp_path: Path) -> None:
    loaded = tiny.build()
    loaded.model.layers[0].attn.qkv.weight[-1, -1] = float("nan")
    build.save(loaded, tmp_path / "m")
    weight = build.lay_out(tmp_path / "m", torch.float32)[1]["layers.0.attn.qkv.weight"]
    weight.read([(slice(0, 4), slice(0, 32))])
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.v_proj\.weight holds NaN or infinity"):
        weight.whole()
