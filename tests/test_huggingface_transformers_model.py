"""Any class of transformers, and a user's own, trains, evaluates, generates and exports by one path."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_huggingface_load import Payload

from longfire.checkpoint.weights import open_model
from longfire.cli import main
from longfire.config.options import Sampling
from longfire.config.run import Run
from longfire.data.batch import Batch
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import CheckpointError, SettingsError
from longfire.generation.continuation import Continuation
from longfire.generation.generate import generate
from longfire.generation.steps import steps
from longfire.huggingface import transformers_files, transformers_model
from longfire.huggingface.check import KL_NATS, kl
from longfire.huggingface.transformers_documents import check_documents_separate
from longfire.loss import loss_sum, losses
from longfire.mixers.mixer import Sequence
from longfire.ops.documents import Documents

pytestmark = pytest.mark.dtype

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MAMBA = {
    "model_type": "mamba",
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "state_size": 4,
}
PLUGIN = '''
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BagConfig(PreTrainedConfig):
    model_type = "bag_of_words"

    def __init__(self, vocab_size=258, hidden_size=16, num_hidden_layers=1, **rest):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers


class BagForCausalLM(PreTrainedModel):
    """The mean of all words so far."""

    config_class = BagConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids):
        x = self.words(input_ids).cumsum(1)
        return CausalLMOutput(logits=self.out(x / torch.arange(1, x.shape[1] + 1)[:, None]))


AutoConfig.register("bag_of_words", BagConfig)
AutoModelForCausalLM.register(BagConfig, BagForCausalLM)
'''


@pytest.fixture
def neox() -> transformers_model.TransformersModel:
    return transformers_model.build(transformers_model.read_model_config(NEOX, "config.json"), 3)


def words_for(folder: Path, config: dict, name: str = "run") -> list[str]:
    """A small run of a config as the command line says it."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"text {i} of words"}) for i in range(99))
    )
    said = {
        "job.dump_folder": folder / name,
        "model.config": folder / "config.json",
        "model.backend": "transformers",
        "data.dataset": folder / "texts.jsonl",
        "data.folder": folder / "stores",
        "data.num_workers": 1,
        "data.validation_fraction": 0.2,
        "training.seq_len": 16,
        "training.batch_size": 2,
        "training.threads": 1,
        "training.compile": "off",
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.name": "constant",
        "eval.at_end": "false",
        "metrics.report": "false",
    }
    return [word for key, value in said.items() for word in (f"--{key}", str(value))]


def test_their_loss_and_gradients(neox):
    ids_BT = torch.randint(258, (2, 20), generator=torch.Generator().manual_seed(1))
    labels_BT = F.pad(ids_BT[:, 1:], (0, 1), value=-100)
    ours = loss_sum(neox, Batch(ids_BT, labels_BT, torch.arange(20).expand(2, -1)), 1024) / 38
    ours.backward()
    grads = {name: p.grad.clone() for name, p in neox.theirs.named_parameters()}
    neox.zero_grad()
    theirs = neox.theirs(ids_BT, labels=ids_BT).loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        nats_BT, greedy_BT = losses(
            neox, Batch(ids_BT, labels_BT, torch.arange(20).expand(2, -1)), 1024
        )
        likeliest_BT = neox.theirs(ids_BT).logits.argmax(-1)
    torch.testing.assert_close(nats_BT.sum() / 38, theirs.detach())
    assert greedy_BT.equal((likeliest_BT == labels_BT) & (labels_BT >= 0))
    for name, p in neox.theirs.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)


def test_it_begins_by_the_seed_alone():
    shape = transformers_model.read_model_config(NEOX, "")
    before = torch.get_rng_state()
    one, same, other = (transformers_model.build(shape, seed).state_dict() for seed in (1, 1, 2))
    assert all(one[name].equal(same[name]) for name in one)
    assert not all(one[name].equal(other[name]) for name in one)
    assert torch.get_rng_state().equal(before)


def test_flops_are_counted_by_parameters(neox):
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 48)  # of two layers
    assert neox.flops_per_token(16) == 2 * (matrices + 258 * 32)
    tied = transformers_model.build(
        transformers_model.read_model_config({**NEOX, "tie_word_embeddings": True}, ""), 0
    )
    assert tied.flops_per_token(16) == neox.flops_per_token(16)


def test_dropout_is_at_work_only_while_it_learns():
    model = transformers_model.build(
        transformers_model.read_model_config({**NEOX, "hidden_dropout": 0.5}, ""), 0
    )
    ids_BT = torch.arange(20)[None]
    assert not model(ids_BT).equal(model(ids_BT))
    with torch.no_grad():
        assert model(ids_BT).equal(model(ids_BT))


def test_half_precision_is_autocast(neox):
    half = transformers_model.TransformersModel(neox.config, neox.theirs, torch.bfloat16)
    logits = half(torch.arange(5)[None])
    assert logits.dtype == torch.bfloat16 and next(half.parameters()).dtype == torch.float32
    assert half.logits(logits).dtype == torch.float32


@torch.no_grad()
def test_generation_is_plain_forwards_also_of_rows_of_several_lengths(neox):
    sampling, prompts = Sampling(max_new_tokens=6, temperature=0), ([5, 6, 7, 8], [9, 1])
    alone = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(neox.theirs(torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(ids[len(prompt) :])
        assert generate(neox, list(prompt), sampling) == alone[-1]
    rows = [Continuation(list(prompt), sampling) for prompt in prompts]
    drawn = [[], []]
    for row, one in steps(neox, rows):
        drawn[rows.index(row)].append(one)
    assert drawn == alone


def test_the_life_of_a_model_that_longfire_has_no_mixer_for(tmp_path, capsys, in_fp32):
    words = words_for(tmp_path, {**NEOX, "attention_dropout": 0.1})
    run = tmp_path / "run"
    assert main(["train", *words, "--training.steps", "2"]) == 0
    assert "2 layers (2 gpt_neox)" in capsys.readouterr().out
    assert main(["train", str(run / "run.toml"), "--training.steps", "4"]) == 0
    assert (
        main(
            [
                "train",
                *words_for(tmp_path, {**NEOX, "attention_dropout": 0.1}, "whole"),
                "--training.steps",
                "4",
            ]
        )
        == 0
    )
    one, whole = (open_model(tmp_path / name).model.state_dict() for name in ("run", "whole"))
    assert all(one[name].equal(whole[name]) for name in one), "2N = N + N, their dropout included"
    assert (
        main(["eval", str(run)]) == 0
        and main(["generate", str(run), "--prompt", "text", "--max_new_tokens", "3"]) == 0
    )
    capsys.readouterr()
    assert main(["export", str(run), "--step", "4", str(tmp_path / "out")]) == 0
    assert "equal byte for byte" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    ids_BT = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert type(theirs).__name__ == "GPTNeoXForCausalLM"
        assert kl(theirs.eval()(ids_BT).logits, open_model(run).model(ids_BT)) < KL_NATS
    assert theirs.config.eos_token_id == bytes_tokenizer().eos_id
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "GPTNeoXForCausalLM of" in card
        and "| steps | 4 |" in card
        and "longfire generate" not in card
    )
    assert main(["export", str(run), "--dtype", "bfloat16", str(tmp_path / "out")]) == 0
    assert "by rounding" in capsys.readouterr().out
    words = ["--model", str(run), "--config", "gla-340m", "--output", str(tmp_path / "gla")]
    assert main(["convert", *words]) != 0
    assert "a run of model.backend = 'transformers'" in capsys.readouterr().err


@pytest.mark.slow  # compiling takes most of a minute
def test_it_begins_with_their_weights_and_compiles(neox, tmp_path):
    transformers_files.save(neox, tmp_path / "hf", torch.float32, {}, 10**9)
    more = [
        "--model.weights",
        str(tmp_path / "hf"),
        "--training.steps",
        "1",
        "--optimizer.lr",
        "1e-9",
    ]
    for name, compiled in (("eager", "off"), ("compiled", "on")):
        assert (
            main(["train", *words_for(tmp_path, NEOX, name), *more, "--training.compile", compiled])
            == 0
        )
        begun, given = (
            open_model(tmp_path / name).model.theirs,
            dict(neox.theirs.named_parameters()),
        )
        assert all((p - given[n]).abs().max() < 1e-6 for n, p in begun.named_parameters())


def test_a_class_of_the_users_own(tmp_path):
    (tmp_path / "bag.py").write_text(PLUGIN)
    words = [*words_for(tmp_path, {"model_type": "bag_of_words"}), "--training.steps", "2"]
    with pytest.raises(SettingsError, match="bag_of_words.*files? of model.plugins registers"):
        Run.compose(None, dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2])))
    assert main(["train", *words, "--model.plugins", str(tmp_path / "bag.py")]) == 0
    code = ["--plugins", str(tmp_path / "bag.py")]
    assert (
        main(
            ["generate", str(tmp_path / "run"), "--prompt", "text", "--max_new_tokens", "2", *code]
        )
        == 0
    )
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *code]) == 0
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type
        == "bag_of_words"
    )


def test_packed_documents_where_the_class_keeps_them_apart(neox, tmp_path):
    check_documents_separate(neox)
    lengths = [7, 1, 12]
    ids_BT = torch.randint(258, (1, 20))
    documents = Documents.from_ids(
        torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    )
    positions_BT = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = neox(ids_BT, Sequence(positions_BT, documents)).split(lengths, 1)
        for alone, together in zip(ids_BT.split(lengths, 1), packed):
            assert kl(neox(alone), together) < KL_NATS
    assert (
        main(
            ["train", *words_for(tmp_path, NEOX), "--training.steps", "1", "--data.varlen", "true"]
        )
        == 0
    )


def test_packed_documents_are_refused_where_it_does_not_or_nothing_shows(tmp_path, capsys):
    """A recurrence lets everything through; a model that ignores what came before shows nothing."""
    assert (
        main(
            ["train", *words_for(tmp_path, MAMBA), "--training.steps", "1", "--data.varlen", "true"]
        )
        == 2
    )
    assert "data.varlen: MambaForCausalLM" in capsys.readouterr().err
    shape = transformers_model.read_model_config(NEOX, "")
    deaf = transformers_model.build(shape, 0)
    for layer in deaf.theirs.gpt_neox.layers:
        layer.attention.dense.weight.data.zero_()
    with pytest.raises(
        SettingsError, match="gives the same whether it sees earlier documents or not"
    ):
        check_documents_separate(deaf)


@pytest.mark.parametrize(
    "config, more, message",
    [
        ({"model_type": "never_heard_of"}, [], "never_heard_of"),
        ({"hidden_size": 3}, [], "model_type is missing"),
        ({"model_type": "vit"}, [], "vocab_size"),
        (
            {**NEOX, "vocab_size": 100},
            [],
            "vocab_size = 100 .* smaller than the tokenizer's 258 words",
        ),
        ({**NEOX, "num_attention_heads": 5}, [], "transformers cannot read it .*not divisible"),
        (
            NEOX,
            ["--activation_checkpoint.mode", "block"],
            "activation_checkpoint.mode = 'block' .* nothing of the model's inside",
        ),
        (NEOX, ["--model.kernels", "reference"], "model.kernels = 'reference'"),
        (NEOX, ["--distillation.teacher", "x"], "distillation.teacher = 'x'"),
        (
            {**NEOX, "tie_word_embeddings": True},
            ["--optimizer.head_lr_scale", "2"],
            "head_lr_scale = 2, but with tie_word",
        ),
        (
            NEOX,
            ["--training.seq_len", "65"],
            "training.seq_len = 65 is longer than max_position_embeddings = 64",
        ),
    ],
)
def test_what_cannot_be_is_refused(config, more, message, tmp_path, capsys):
    assert main(["train", *words_for(tmp_path, config), *more]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_state_that_checkpoints_do_not_hold_is_refused(neox):
    neox.theirs.register_buffer("seen", torch.zeros(1))
    with pytest.raises(
        SettingsError, match="GPTNeoXForCausalLM keeps state beside its parameters .seen."
    ):
        transformers_model.check_buffers(neox.theirs)


def test_weights_of_another_model_and_hostile_ones_are_named(neox, tmp_path):
    transformers_files.save(neox, tmp_path / "hf", torch.float32, {}, 10**9)
    other = transformers_model.read_model_config({**NEOX, "num_hidden_layers": 3}, "")
    with pytest.raises(CheckpointError, match="its tensors are not those of the model"):
        transformers_files.load_weights(tmp_path / "hf", other)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "victim")}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="transformers cannot load its weights"):
        transformers_files.load_weights(tmp_path / "hf", neox.config)
    assert not (tmp_path / "victim").exists()


MAMBA_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
ATTENDED = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2}
SAVED = {
    "an infinite limit": {
        "model_type": "bamba",
        **SIZES,
        **ATTENDED,
        **MAMBA_HEADS,
        "attn_layer_indices": [1],
    },
    "keeps its last state": {"model_type": "recurrent_gemma", **SIZES, **ATTENDED, "lru_width": 32},
}


@pytest.mark.parametrize("case", SAVED)
def test_what_was_saved_is_read_again(case, tmp_path):
    """transformers writes an infinite number of a config as {"__float__": "Infinity"}."""
    model = transformers_model.build(
        transformers_model.read_model_config(SAVED[case], "config.json"), seed=0
    )
    model(torch.randint(258, (1, 8)))
    transformers_files.save(
        model, tmp_path / "hf", torch.float32, {"bos_token_id": 1, "eos_token_id": 2}, 10**9
    )
    transformers_files.compare_saved(model, tmp_path / "hf", torch.float32)
    shape = transformers_model.read_model_config(
        json.loads((tmp_path / "hf/config.json").read_text()), "config.json"
    )
    weights = transformers_files.load_weights(tmp_path / "hf", shape)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_infinity_in_a_config_however_it_is_written():
    config = {**SAVED["an infinite limit"], "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert transformers_model.config_of(config).time_step_limit[1] == float("inf")
    assert transformers_model.config_of(
        json.loads(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))
    ).time_step_limit[1] == float("inf")
