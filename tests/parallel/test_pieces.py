"""Pieces, their boxes, and files that many ranks write: against NumPy's own indexing."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpcllm import tensors
from hpcllm.parallel import pieces

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3)


@given(SHAPES, st.data())
def test_runs_are_the_places_of_a_box(shape, data):
    box = []
    for length in shape:
        start = data.draw(st.integers(0, length))
        box.append(slice(start, data.draw(st.integers(start, length))))
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    found = [at for start, length in tensors.runs(shape, box) for at in range(start, start + length)]
    assert found == numbers[tuple(box)].flatten().tolist()


@given(SHAPES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_the_pieces_of_all_ranks_make_up_the_whole(shape, tensor, shard, packed, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= packed
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    whole = torch.full_like(numbers, -1)
    for index in range(tensor):
        piece = pieces.cut(torch.Size(shape), dim, tensor, index, packed)
        mine = piece.take(numbers)
        assert mine.shape == piece.local_shape
        each = -(-mine.shape[0] // shard)  # as FSDP2 shares out rows
        for start in range(0, shard * each, each) if each else [0]:
            part = mine[min(start, len(mine)) : start + each]
            for outer, inner in piece.rows(min(start, len(mine)), min(start + each, len(mine))):
                assert (whole[outer] == -1).all()  # nobody else has it
                whole[outer] = part[inner]
    assert torch.equal(whole, numbers)


def test_a_file_of_pieces_is_the_one_that_safetensors_writes(tmp_path):
    held = {
        "b.weight": torch.randn(5, 6),
        "a.half": torch.randn(3, 4).bfloat16(),
        "number": torch.tensor(7.0),
        "long": torch.arange(3),
        "empty": torch.empty(0, 4),
    }
    outline = tensors.Outline({name: (value.dtype, value.shape) for name, value in held.items()})
    outline.create(tmp_path / "ours")
    handle = os.open(tmp_path / "ours", os.O_WRONLY)
    for name, value in held.items():
        if value.dim() == 2 and len(value):
            for columns in (slice(0, 2), slice(2, None)):
                for rows in (slice(0, 1), slice(1, None)):
                    outline.write(handle, name, (rows, columns), value[rows, columns])
        else:
            outline.write(handle, name, tuple(slice(None) for _ in value.shape), value)
    os.close(handle)
    again = load_file(tmp_path / "ours")
    assert again.keys() == held.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in held.items())
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        piece = pieces.cut(torch.Size((5, 6)), 1, 2, 1)
        out = tensors.read(opened, "b.weight", piece.rows(1, 4), torch.empty(3, 3))
        assert torch.equal(out, held["b.weight"][1:4, 3:])


def test_a_file_that_does_not_fit_is_refused_when_it_is_made(tmp_path):
    outline = tensors.Outline({"x": (torch.float32, torch.Size((1 << 60,)))})
    with pytest.raises(OSError):
        outline.create(tmp_path / "file")
