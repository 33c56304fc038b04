"""checkpoint/shards.py: what the header of a file says of its tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longfire.checkpoint.shards import BOXES, LocalTensor, read_index, write_shard
from longfire.parallel.sharding import TensorSlice

WHOLE = TensorSlice((0, 0), (4, 6), (0, 0))


def test_parts_are_found_by_their_header(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    write_shard({"a": LocalTensor(tensor, (4, 6), [WHOLE])}, tmp_path / "one.safetensors")
    index = read_index([tmp_path / "one.safetensors"])
    assert list(index) == ["a"] and index["a"].shape == (4, 6)


def test_a_file_of_whole_tensors_needs_no_header_of_ours(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")
    assert list(read_index([tmp_path / "one.safetensors"])) == ["a"]


@pytest.mark.parametrize("boxes", [{}, {"b": ["b", [3], [0]]}])
def test_a_header_that_leaves_tensors_out_is_an_error(boxes: object, tmp_path: Path) -> None:
    """A header without any was taken for that of whole tensors, whose names are other ones."""
    file = tmp_path / "one.safetensors"
    save_file({"a#0": torch.zeros(3)}, file, metadata={BOXES: json.dumps(boxes)})
    with pytest.raises(ValueError, match="its header names other tensors than it has"):
        read_index([file])
