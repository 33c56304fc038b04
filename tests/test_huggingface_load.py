"""huggingface/load.py: every way in which a folder holds weights, one tensor at a time; and what is damaged, foreign or hostile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from golden import read
from safetensors.torch import load_file, save_file

from longfire.errors import CheckpointError
from longfire.huggingface.load import load_weights, model_config_in, read_weights
from longfire.huggingface.weight_files import INDEX, SINGLE, WeightFiles

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        vocab_size=97,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def folder(theirs, tmp_path) -> Path:
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def as_bin(folder: Path, shards: int = 1) -> Path:
    """The same weights in PyTorch's own files."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    if shards == 1:
        torch.save(tensors, folder / BIN)
        return folder
    names = list(tensors)
    files = {
        name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin"
        for i, name in enumerate(names)
    }
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def same(ours: dict, theirs) -> bool:
    expected = {name: p.detach() for name, p in theirs.named_parameters()}
    return len(ours) == len(expected) and all(
        tensor.equal(expected[renamed(name)]) for name, tensor in ours.items()
    )


def renamed(name: str) -> str:
    """Written out by hand: the test knows no table."""
    pairs = (
        ("embed.", "model.embed_tokens."),
        ("norm.", "model.norm."),
        ("head.", "lm_head."),
        ("layers.", "model.layers."),
    )
    name = next(theirs + name.removeprefix(ours) for ours, theirs in pairs if name.startswith(ours))
    for ours, theirs in (
        (".mixer_norm.", ".input_layernorm."),
        (".mlp_norm.", ".post_attention_layernorm."),
        (".mixer.", ".self_attn."),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorchs_own_files_are_read_as_well(theirs, folder, shards):
    ours = load_weights(as_bin(folder, shards), model_config_in(folder))
    assert same(ours, theirs)
    assert all(
        tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        for tensor in ours.values()
    )


def test_safetensors_come_before_all_others(theirs, folder):
    (folder / BIN).write_bytes(b"never opened")
    assert same(load_weights(folder, model_config_in(folder)), theirs)


def test_one_file_is_open_at_a_time(folder, monkeypatch):
    files = WeightFiles(as_bin(folder, 3))
    opened = [files._file]
    monkeypatch.setattr(
        files, "_opened", lambda file, real=files._opened: (opened.append(file), real(file))[1]
    )
    for name in files.tensors:
        files.read(name)
        assert set(files._content) == {n for n, t in files.tensors.items() if t.file == files._file}
    assert len(set(opened)) == 3


def test_the_model_without_its_head_lacks_a_prefix(tmp_path):
    """`GPT2Model.save_pretrained`, and the files of GPT-2 itself: no `transformer.`, a causal mask among the weights."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=16)
    )
    theirs.save_pretrained(tmp_path / "whole")
    theirs.transformer.save_pretrained(tmp_path / "bare")
    tensors = load_file(tmp_path / "bare" / SINGLE)
    save_file(
        {
            **tensors,
            "h.0.attn.bias": torch.ones(1, 1, 16, 16),
            "h.1.attn.masked_bias": torch.ones(()),
        },
        tmp_path / "bare" / SINGLE,
    )
    whole, bare = (
        load_weights(tmp_path / name, model_config_in(tmp_path / name))
        for name in ("whole", "bare")
    )
    assert "wpe.weight" in tensors and whole.keys() == bare.keys()
    assert all(whole[name].equal(bare[name]) for name in whole)
    c_attn = theirs.transformer.h[1].attn.c_attn
    q, k, v = (whole[f"layers.1.mixer.{x}_proj.weight"] for x in "qkv")
    assert torch.cat([q, k, v]).t().equal(c_attn.weight), (
        "Conv1D keeps (in, out), and the three of them side by side"
    )
    assert torch.cat([whole[f"layers.1.mixer.{x}_proj.bias"] for x in "qkv"]).equal(c_attn.bias)


def test_names_and_shapes_are_compared_before_a_tensor_is_read(folder, monkeypatch):
    tensors = load_file(folder / SINGLE)
    del tensors["model.norm.weight"]
    save_file({**tensors, "lm_head.bias": torch.ones(97)}, folder / SINGLE)
    monkeypatch.setattr(WeightFiles, "read", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(
        CheckpointError, match="missing: model.norm.weight; not known: lm_head.bias"
    ):
        next(read_weights(folder, model_config_in(folder)))


class Payload:
    """What a pickle of PyTorch's can do to its reader."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickle_that_wants_to_run_code_does_not(folder, tmp_path, shards):
    as_bin(folder, shards)
    file = sorted(folder.glob("*.bin"))[0]
    content = torch.load(file, weights_only=True)
    torch.save({**content, "model.norm.weight": Payload(tmp_path / "victim")}, file)
    with pytest.raises(
        CheckpointError, match=f"{file.name}: cannot be read as tensors alone .*run code"
    ):
        load_weights(folder, model_config_in(folder))
    assert not (tmp_path / "victim").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "victim").exists(), "the payload is one"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "cut off"),
        (lambda file: file.write_bytes(b""), "cut off"),
        (
            lambda file: torch.save(torch.load(file), file, _use_new_zipfile_serialization=False),
            "before 1.6",
        ),
        (lambda file: torch.save({"model": torch.load(file)}, file), "other things than tensors"),
        (lambda file: torch.save([1, 2], file), "other things than tensors"),
    ],
)
def test_damaged_and_foreign_files_of_pytorch_are_named(folder, spoil, message):
    spoil(as_bin(folder) / BIN)
    with pytest.raises(CheckpointError, match=f"{BIN}: .*{message}"):
        load_weights(folder, model_config_in(folder))


def test_bytes_lost_in_the_middle_of_a_zip_are_named(folder):
    """The directory at its end is whole, so it opens; the tensors behind it are not where it says."""
    file = as_bin(folder) / BIN
    content = file.read_bytes()
    file.write_bytes(content[:3000] + content[9000:])
    with pytest.raises(CheckpointError, match=f"{BIN}: "):
        load_weights(folder, model_config_in(folder))


@pytest.mark.parametrize("index, suffix", [(INDEX, "safetensors"), (BIN_INDEX, "bin")])
@pytest.mark.parametrize("name", ["../secret.{}", "/etc/x.{}", "sub/x.{}", "..", "model.pkl", None])
def test_no_index_leads_out_of_its_folder(folder, index, suffix, name):
    (folder / SINGLE).unlink()
    name = name and name.format(suffix)
    (folder / index).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    wrong = f"not the name of a .{suffix} file in the same folder"
    with pytest.raises(CheckpointError, match=wrong if name else "must be text, not None"):
        WeightFiles(folder)


MEMORY = """
import re, sys
from pathlib import Path
import torch, transformers
from longfire.huggingface.import_ import write_step_0
from longfire.huggingface.load import model_config_in, read_weights

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, place = map(Path, sys.argv[1:])
shape = model_config_in(folder)
write_step_0(iter([("warm", torch.ones(2))]), place.with_name("warm"))  # what is imported on the way
before = peak()
write_step_0(read_weights(folder, shape), place, 8_000_000)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' high-water mark")
def test_no_more_than_a_shard_is_in_memory(tmp_path):
    """200 MB in shards of 8 MB, each tensor at most 4 MB: read and written within some shards, and not the whole."""
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_hidden_layers=12,
        intermediate_size=2048,
        vocab_size=2048,
        num_attention_heads=8,
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="8MB")
    size = sum(p.nbytes for p in theirs.parameters())
    assert size > 200e6 and len(list((tmp_path / "hf").glob("*.safetensors"))) > 20
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "hf"), str(tmp_path / "step-0")]
    grown = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert grown < 64e6, f"{grown / 1e6:.0f} MB more than before, of {size / 1e6:.0f} MB of weights"


@pytest.mark.parametrize("case", ["gla", "retnet"])
def test_the_output_norm_under_both_names_that_fla_gives_it(case, tmp_path):
    """fuse_norm = false is the same mathematics, but the norm that is not fused with its gate is another attribute there."""
    golden = read(case)
    (tmp_path / "config.json").write_text(json.dumps({**golden.config, "fuse_norm": False}))
    other = {
        name.replace("g_norm_swish_gate", "g_norm"): tensor
        for name, tensor in golden.weights.items()
    }
    assert other.keys() != golden.weights.keys()
    save_file(other, tmp_path / SINGLE)
    loaded = load_weights(tmp_path, model_config_in(tmp_path))
    norm = "layers.0.mixer.g_norm_swish_gate.weight"
    assert loaded[norm].equal(golden.weights["model.layers.0.attn.g_norm_swish_gate.weight"])
