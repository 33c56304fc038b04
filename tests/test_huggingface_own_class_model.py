"""hf/: LongfireForCausalLM in the hands of transformers: generate, padding, Trainer, PEFT, lm-eval; and back to longfire."""

import importlib.util
import json
import math

import any_model
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from longfire.checkpoint.weights import open_model
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import SettingsError
from longfire.huggingface import own_config
from longfire.huggingface.export import export
from longfire.huggingface.import_ import import_hf
from longfire.huggingface.load import load_model, model_of
from longfire.huggingface.own_class.cache import GenerationCache
from longfire.huggingface.own_class.config import LongfireConfig
from longfire.huggingface.own_class.model import LongfireForCausalLM
from longfire.huggingface.own_config import LONGFIRE
from longfire.huggingface.tensors import to_theirs
from longfire.initialise import build
from longfire.mixers import MIXERS
from longfire.model import Model

EACH = [(name,) for name in MIXERS]
HYBRIDS = [("gla", "attention"), ("mamba2", "attention", "kda"), ("rwkv7", "attention", "rwkv7")]
WINDOWED = {"attention": {"num_heads": 4, "num_kv_heads": 1, "window_size": 5}}
TOLERANCE = 32 * 2**-23  # of the largest logit: sums in another order, over two layers
transformers = pytest.importorskip("transformers")


def missing(*packages: str) -> pytest.MarkDecorator:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def wrapped(model: Model) -> LongfireForCausalLM:
    """The model in transformers' class, through config.json and the names in files."""
    config = LongfireConfig(**json.loads(json.dumps(own_config.config_of(model.config, 64))))
    ours = LongfireForCausalLM(config).eval()
    weights = to_theirs(LONGFIRE, model.config, dict(model.state_dict()))
    result = ours.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"model.head.weight"}
    return ours


@pytest.fixture(scope="module")
def hybrid() -> LongfireForCausalLM:
    from conftest import tiny_model

    return wrapped(
        tiny_model(
            "gla", "kda", "attention", num_hidden_layers=3, mixers=mixers("gla", "kda", "attention")
        )
    )


def mixers(*names: str) -> dict:
    return {name: {**any_model.MIXER_SETTINGS[name], **WINDOWED.get(name, {})} for name in names}


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@settings(max_examples=15, deadline=None)
@given(any_model.shapes())
def test_any_hybrid_gives_the_same_logits(shape):
    """Config, names of tensors and forward carry every option: the same operations, so the same bits."""
    model = build(shape, 0).eval()
    for name, parameter in model.named_parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    ids_BT = ids_of(2, 17)
    with torch.no_grad():
        assert wrapped(model)(ids_BT).logits.equal(model.logits(model(ids_BT)))


@settings(max_examples=25, deadline=None)
@given(any_model.shapes())
@pytest.mark.slow
def test_any_hybrid_is_exported_and_loaded_by_its_class(shape):
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    shape = replace(shape, vocab_size=258)
    model = build(shape, 0)
    with tempfile.TemporaryDirectory() as folder:
        check = export(model, bytes_tokenizer(), Path(folder) / "hf")
        assert check.peer_kl is not None or "of fla" in check.peer
        again, _ = load_model(Path(folder) / "hf")
        ids_BT = ids_of(2, 17)
        with torch.no_grad():
            assert again.logits(again(ids_BT)).equal(model.logits(model(ids_BT)))
            if check.peer.startswith("LongfireForCausalLM"):
                theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf")
                assert theirs(ids_BT).logits.equal(model.logits(model(ids_BT)))


@pytest.mark.parametrize("types", [*EACH, *HYBRIDS])
def test_padding_on_either_side_changes_nothing(types, tiny_model):
    """Three texts of other lengths in a batch give what each gives alone."""
    model = wrapped(
        tiny_model(*types, num_hidden_layers=max(2, len(types)), mixers=mixers(*set(types)))
    )
    texts = [ids_of(1, length, length) for length in (3, 11, 7)]
    alone = [model(text).logits[0] for text in texts]
    for side in ("left", "right"):
        padded, mask = padded_on(side, texts)
        logits_BTW = model(padded, attention_mask=mask, use_cache=False).logits
        for row, expected in enumerate(alone):
            assert apart(logits_BTW[row, mask[row].bool()], expected) < TOLERANCE


def padded_on(side: str, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(text.shape[1] for text in texts)
    ids, masks = [], []
    for text in texts:
        fill = longest - text.shape[1]
        amounts = (fill, 0) if side == "left" else (0, fill)
        ids.append(F.pad(text, amounts, value=1))
        masks.append(F.pad(torch.ones_like(text), amounts, value=0))
    return torch.cat(ids), torch.cat(masks)


def greedy(model: LongfireForCausalLM, ids_BT: Tensor, tokens: int, **how) -> Tensor:
    return model.generate(ids_BT, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **how)


@pytest.mark.parametrize("types", [*EACH, *HYBRIDS])
def test_cached_greedy_generation_equals_uncached_in_a_padded_batch(types, tiny_model):
    model = wrapped(
        tiny_model(*types, num_hidden_layers=max(2, len(types)), mixers=mixers(*set(types)))
    )
    texts = [ids_of(1, length, length) for length in (3, 11, 7)]
    padded, mask = padded_on("left", texts)
    cached = greedy(model, padded, 12, attention_mask=mask)
    assert cached.equal(greedy(model, padded, 12, attention_mask=mask, use_cache=False))
    for row, text in enumerate(texts):
        assert cached[row, -12:].equal(greedy(model, text, 12)[0, -12:]), (
            "who else is in the batch changes nothing"
        )


def test_dynamic_positions_are_of_the_text_and_not_of_its_padding(tiny_model):
    """Beyond the original length the turns depend on the length: of each text, though the batch has another one."""
    softmax = {"num_heads": 4, "rope": "dynamic", "rope_factor": 2.0, "rope_original_length": 8}
    model = wrapped(tiny_model("attention", "kda", mixers={"attention": softmax, **mixers("kda")}))
    texts = [ids_of(1, length, length) for length in (12, 20)]
    padded, mask = padded_on("left", texts)
    for use_cache in (False, True):
        logits_BTW = model(padded, attention_mask=mask, use_cache=use_cache).logits
        for row, text in enumerate(texts):
            assert apart(logits_BTW[row, mask[row].bool()], model(text).logits[0]) < TOLERANCE


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(any_model.shapes())
def test_any_hybrid_goes_on_from_a_padded_batch(shape):
    """Token by token from the cache, and all at once, as each text alone."""
    model = wrapped(build(shape, 0))
    texts, more = [ids_of(1, length, length) for length in (3, 11, 7)], ids_of(3, 6, 5)
    padded, mask = padded_on("left", texts)
    whole_mask = F.pad(mask, (0, 6), value=1)
    with torch.no_grad():
        cache = model(padded, attention_mask=mask, use_cache=True).past_key_values
        steps = [
            model(
                more[:, t : t + 1], attention_mask=whole_mask[:, : 12 + t], past_key_values=cache
            ).logits
            for t in range(6)
        ]
        at_once = model(
            torch.cat([padded, more], 1), attention_mask=whole_mask, use_cache=False
        ).logits[:, -6:]
        alone = [
            model(torch.cat([text, more[i : i + 1]], 1)).logits[:, -6:]
            for i, text in enumerate(texts)
        ]
    assert apart(torch.cat(steps, 1), torch.cat(alone)) < 8 * TOLERANCE
    assert apart(at_once, torch.cat(alone)) < 8 * TOLERANCE


def test_beams_and_several_samples_go_on_from_the_right_states(hybrid):
    padded, mask = padded_on("left", [ids_of(1, 3), ids_of(1, 8)])
    beams = greedy(hybrid, padded, 8, attention_mask=mask, num_beams=3)
    assert beams.equal(greedy(hybrid, padded, 8, attention_mask=mask, num_beams=3, use_cache=False))
    torch.manual_seed(0)
    some = hybrid.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=True,
        num_return_sequences=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    again = hybrid.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=True,
        num_return_sequences=2,
        pad_token_id=0,
        use_cache=False,
    )
    assert len(some) == 4 and some.equal(again)


def test_a_conversation_goes_on_from_its_cache(hybrid):
    padded, mask = padded_on("left", [ids_of(1, 3), ids_of(1, 8)])
    first = greedy(hybrid, padded, 4, attention_mask=mask, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, GenerationCache) and cache.get_seq_length() == 8 + 4 - 1
    longer = torch.cat([first.sequences, ids_of(2, 5, 9)], 1)
    mask = F.pad(mask, (0, longer.shape[1] - mask.shape[1]), value=1)
    went_on = greedy(hybrid, longer, 6, attention_mask=mask, past_key_values=cache)
    assert went_on.equal(greedy(hybrid, longer, 6, attention_mask=mask))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: m(x, attention_mask=torch.tensor([[1, 1, 0, 1]])), "padding inside a text"),
        (
            lambda m, x: m(x, attention_mask=torch.tensor([[1, 1, 1, 0]]), use_cache=True),
            "pad on the left",
        ),
        (
            lambda m, x: greedy(m, x, 3, attention_mask=torch.tensor([[1, 1, 1, 0]])),
            "pad on the left",
        ),
        (lambda m, x: m(x, attention_mask=torch.ones(1, 1, 4, 4)), r"\(sequences, tokens\)"),
        (lambda m, x: m(x, attention_mask=torch.ones(1, 5)), "differ"),
        (
            lambda m, x: m(x, past_key_values=transformers.DynamicCache()),
            "past_key_values is a DynamicCache",
        ),
        (lambda m, x: m(inputs_embeds=torch.zeros(1, 4, 32)), "takes input_ids"),
        (lambda m, x: m(x, output_attentions=True), "output_attentions"),
    ],
)
def test_what_it_cannot_do_is_refused(hybrid, call, message):
    with pytest.raises(ValueError, match=message):
        call(hybrid, ids_of(1, 4))


def test_positions_that_were_not_learned_are_refused(tiny_model):
    model = wrapped(
        tiny_model(
            "kda",
            "gla",
            learned_positions=True,
            max_position_embeddings=8,
            mixers=mixers("kda", "gla"),
        )
    )
    with pytest.raises(ValueError, match="9 tokens, but the model has learned 8 positions"):
        model(ids_of(1, 9))
    with pytest.raises(ValueError, match="learned 8 positions"):
        greedy(model, ids_of(1, 5), 6)


def test_the_loss_is_of_shifted_labels_per_token(hybrid):
    ids_BT = ids_of(2, 9)
    labels_BT = ids_BT.clone()
    labels_BT[0, :4] = -100
    out = hybrid(ids_BT, labels=labels_BT)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    counted = hybrid(ids_BT, labels=labels_BT, num_items_in_batch=100).loss
    assert counted.item() == pytest.approx(expected.item() * 13 / 100, rel=1e-6)
    assert hybrid(ids_BT, logits_to_keep=2).logits.equal(out.logits[:, -2:])
    assert hybrid(ids_BT, labels=labels_BT, return_dict=False)[0].equal(out.loss)


def test_positions_that_begin_anew_are_documents(hybrid):
    one, two = ids_of(1, 6), ids_of(1, 5, 1)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    packed = hybrid(torch.cat([one, two], 1), position_ids=positions).logits
    assert apart(packed[:, 6:], hybrid(two).logits) < TOLERANCE
    assert hybrid(one, position_ids=torch.arange(6)[None]).logits.equal(hybrid(one).logits)


def test_hidden_states_are_those_of_transformers(hybrid):
    out = hybrid(ids_of(1, 5), output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(1, 5, 32)] * 4
    assert hybrid.model.logits(out.hidden_states[-1]).equal(out.logits)
    assert out.hidden_states[0].equal(hybrid.model.embed(ids_of(1, 5)))
    assert hybrid(ids_of(1, 5)).hidden_states is None


@pytest.mark.parametrize("types", [("rwkv7", "attention", "rwkv7"), ("hgrn2", "kda")])
def test_gradient_checkpointing_changes_no_gradient(types, tiny_model):
    """Dropout is at work: what is recomputed drops the same."""
    model = wrapped(
        tiny_model(
            *types,
            num_hidden_layers=len(types),
            dropout=0.2,
            embed_dropout=0.1,
            mixers=mixers(*set(types)),
        )
    )
    model.train()
    ids_BT, found = ids_of(2, 9), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        model.zero_grad()
        model(ids_BT, labels=ids_BT).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
    torch.manual_seed(1)
    assert not model(ids_BT).logits.equal(model.eval()(ids_BT).logits), "dropout was at work"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A hybrid of our class, exported as a run would: (folder, model)."""
    from conftest import tiny_model

    model = tiny_model(
        "mamba2",
        "kda",
        "attention",
        vocab_size=258,
        num_hidden_layers=3,
        mixers=mixers("mamba2", "kda", "attention"),
    )
    folder = tmp_path_factory.mktemp("export") / "hf"
    check = export(model, bytes_tokenizer(), folder, facts={"seq_len": 77})
    assert check.peer == "LongfireForCausalLM of longfire" and check.peer_kl == 0
    return folder, model


def load(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **how)


def test_what_transformers_saves_is_the_same_model(exported, tmp_path):
    folder, model = exported
    ids_BT = ids_of(2, 20)
    expected = model.logits(model(ids_BT))
    theirs = load(folder)
    assert (
        theirs.config.max_position_embeddings == 77 and theirs.generation_config.eos_token_id == 257
    )
    assert theirs(ids_BT).logits.equal(expected)
    theirs.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again")(ids_BT).logits.equal(expected)
    bytes_tokenizer().save(tmp_path / "again")
    ours, _ = load_model(tmp_path / "again")
    assert ours.logits(ours(ids_BT)).equal(expected)


def test_types(exported, tmp_path):
    """bf16 weights compute in bf16, but for what no type may round; autocast computes with fp32 weights as a run does."""
    folder, model = exported
    ids_BT = ids_of(2, 20)
    narrow = load(folder, dtype=torch.bfloat16)
    kept = {name for name, p in narrow.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        f"model.layers.{i}.mixer.{n}"
        for i, names in enumerate((("A_log", "dt_bias", "D"), ("A_log", "dt_bias")))
        for n in names
    }
    assert narrow(ids_BT).logits.dtype == torch.float32
    rounded = {
        name: p.to(narrow.get_parameter(f"model.{name}").dtype)
        for name, p in model.state_dict().items()
    }
    in_bf16 = model_of(model.config, rounded, compute_dtype=torch.bfloat16)
    assert narrow(ids_BT).logits.equal(in_bf16.logits(in_bf16(ids_BT)))
    masters = model_of(model.config, dict(model.state_dict()), compute_dtype=torch.bfloat16)
    expected = masters.logits(masters(ids_BT))
    with torch.autocast("cpu", torch.bfloat16):
        assert load(folder)(ids_BT).logits.equal(expected)
    assert load(folder).to(torch.bfloat16)(ids_BT).logits.isfinite().all()
    export(model, bytes_tokenizer(), tmp_path / "bf16", dtype=torch.bfloat16)
    assert load(tmp_path / "bf16").dtype == torch.bfloat16, "the type of the files is the default"


def test_tied_embeddings(tiny_model, tmp_path):
    model = tiny_model(
        "gla", "kda", tie_word_embeddings=True, vocab_size=258, mixers=mixers("gla", "kda")
    )
    export(model, bytes_tokenizer(), tmp_path / "hf")
    theirs = load(tmp_path / "hf")
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    ids_BT = ids_of(1, 9)
    assert theirs(ids_BT).logits.equal(model.logits(model(ids_BT)))
    theirs.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again")(ids_BT).logits.equal(theirs(ids_BT).logits)
    ours, _ = load_model_with_bytes(tmp_path / "again")
    assert ours.head.weight is ours.embed.weight and ours.logits(ours(ids_BT)).equal(
        theirs(ids_BT).logits
    )


def load_model_with_bytes(folder):
    bytes_tokenizer().save(folder)
    return load_model(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_grows(tied, tiny_model, tmp_path):
    model = wrapped(
        tiny_model(
            "gla", "kda", tie_word_embeddings=tied, vocab_size=258, mixers=mixers("gla", "kda")
        )
    )
    ids_BT = ids_of(1, 9)
    before = model(ids_BT).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model.config.vocab_size == 300 and model(ids_BT).logits.shape[-1] == 300
    assert apart(model(ids_BT).logits[..., :258], before) < TOLERANCE
    assert model.get_input_embeddings().weight[258:].std() < 1, (
        "as the embedding begins, not N(0, 1)"
    )
    model.save_pretrained(tmp_path)
    ours, _ = load_model_with_bytes(tmp_path)
    assert ours.config.vocab_size == 300 and ours.logits(ours(ids_BT)).equal(
        load(tmp_path)(ids_BT).logits
    )


def test_a_fresh_model_begins_as_in_longfire(tiny_config, hybrid, tmp_path):
    config = LongfireConfig(**own_config.config_of(tiny_config("rwkv7", "gla"), 64))
    torch.manual_seed(0)
    fresh, other = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    torch.manual_seed(0)
    again = transformers.AutoModelForCausalLM.from_config(config)
    expected = build(tiny_config("rwkv7", "gla"), 0).state_dict()
    for name, tensor in expected.items():
        ours = fresh.get_parameter(f"model.{name}")
        assert ours.equal(again.get_parameter(f"model.{name}")), "torch's seed decides"
        assert (
            ours.equal(tensor)
            if not drawn(tensor)
            else ours.std().item() == pytest.approx(tensor.std().item(), rel=0.3)
        ), name
    assert not fresh.model.embed.weight.equal(other.model.embed.weight)
    state = {name: t for name, t in fresh.state_dict().items() if "layers.0.mixer" not in name}
    fresh.save_pretrained(tmp_path, state_dict=state)
    begun, report = load(tmp_path, output_loading_info=True)
    assert report["missing_keys"] and all(
        "layers.0.mixer" in name for name in report["missing_keys"]
    )
    assert all(begun.get_parameter(name).equal(tensor) for name, tensor in state.items()), (
        "what was there stays"
    )
    assert (
        begun.model.layers[0].mixer.k_k.mean() != 0 and begun(ids_of(1, 4)).logits.isfinite().all()
    )


def drawn(tensor: Tensor) -> bool:
    """Whether its values come from a generator, and not from a rule that is the same for every seed."""
    return tensor.dim() >= 2 and len(tensor) > 1


def test_a_config_of_a_run_is_no_export(tiny_config):
    with pytest.raises(SettingsError, match="shape is empty"):
        LongfireConfig(**tiny_config("gla").to_dict()).model_shape()


def test_the_card_says_how_to_load_it(exported, monkeypatch, tmp_path):
    folder, _ = exported
    card = (folder / "README.md").read_text()
    assert (
        "import longfire  # registers LongfireForCausalLM" in card
        and "| layer_types |" in card
        and "## Layers: kda" in card
    )
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    exec(code, names)
    assert (
        type(names["model"]).__name__ == "LongfireForCausalLM"
        and names["tokenizer"]("a")["input_ids"]
    )


def test_it_comes_back_as_a_run(exported, tmp_path):
    folder, model = exported
    check = import_hf(str(folder), tmp_path / "run")
    assert check.peer == "LongfireForCausalLM of longfire" and check.peer_kl == 0
    opened = open_model(tmp_path / "run")
    assert all(
        tensor.equal(opened.model.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_the_pipeline_writes_text(exported):
    folder, _ = exported
    write = transformers.pipeline(
        "text-generation",
        model=load(folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )
    texts = write(["a", "longer text"], max_new_tokens=3, do_sample=False, batch_size=1)
    assert texts[0][0]["generated_text"].startswith("a")


@pytest.mark.slow
@missing("accelerate")
@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_learns_and_its_folder_is_imported(bf16, exported, tmp_path):
    folder, _ = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["the long fire", "a gate and a long fire", "the gate"] * 4
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = transformers.TrainingArguments(
        tmp_path / "trained",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=True,
        seed=0,
    )
    trainer = transformers.Trainer(
        model=load(folder),
        args=arguments,
        train_dataset=[tokenizer(text) for text in texts],
        data_collator=collate,
        eval_dataset=[tokenizer(text) for text in texts[:3]],
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and math.isfinite(trainer.evaluate()["eval_loss"])
    last = tmp_path / "trained" / "checkpoint-6"
    import_hf(str(last), tmp_path / "run")
    ours, ids_BT = open_model(tmp_path / "run").model, ids_of(1, 9)
    ours.compute_in(torch.float32)
    assert ours.logits(ours(ids_BT)).equal(load(last)(ids_BT).logits)


@pytest.mark.slow
@missing("peft", "accelerate")
@pytest.mark.parametrize("types", EACH)
def test_every_lora_adapter_learns_and_merges(types, tiny_model, tmp_path):
    import peft

    folder = tmp_path / "hf"
    wrapped(
        tiny_model(*types, num_hidden_layers=2, mlp="swiglu", mixers=mixers(*types))
    ).save_pretrained(folder)
    lora = peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(0)  # of the adapters, whatever ran before
    model = peft.get_peft_model(load(folder), lora)
    # As small as trained ones: larger ones make a recurrence amplify the rounding of the merge.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    ids_BT = ids_of(1, 12)
    model(ids_BT, labels=ids_BT).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    silent = [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]
    assert len(adapters) >= 16 and not silent, (
        "a matrix that is read past its module would leave its adapter out"
    )
    expected = model(ids_BT).logits
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "lora")
    assert apart(again(ids_BT).logits, expected) < TOLERANCE
    merged = again.merge_and_unload()
    assert apart(merged(ids_BT).logits, expected) < 4 * TOLERANCE
    merged.save_pretrained(tmp_path / "merged")
    ours, _ = load_model_with_bytes(tmp_path / "merged")
    assert ours.logits(ours(ids_BT)).equal(merged(ids_BT).logits)


@pytest.mark.slow
@missing("lm_eval", "accelerate")
def test_lm_eval_scores_and_generates(exported):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, model = exported
    lm = HFLM(pretrained=str(folder), batch_size=2, device="cpu")
    asked = [("the long", " fire"), ("a", " gate")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
    for (context, answer), (scored, _) in zip(asked, found):
        ids = torch.tensor([list((context + answer).encode())])
        logp = model.logits(model(ids[:, :-1])).log_softmax(-1)[0]
        expected = sum(
            logp[t, ids[0, t + 1]].item() for t in range(len(context) - 1, ids.shape[1] - 1)
        )
        assert scored == pytest.approx(expected, abs=1e-3)
    wishes = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    texts = lm.generate_until(
        [Instance("generate_until", {}, (context, wishes), 0) for context, _ in asked]
    )
    assert len(texts) == 2


def test_a_mixer_of_a_plugin_is_exported_with_the_name_of_its_file(tmp_path):
    from longfire.config.model_config import ModelConfig
    from longfire.plugins import load_plugins

    file = tmp_path / "my_mixer_of_a_test.py"
    file.write_text(
        "from longfire.mixers.gla import GLA\n\n\nclass Mine(GLA):\n    pass\n\n\nMIXERS = {'mixer_of_a_test': Mine}\n"
    )
    load_plugins((str(file),))
    try:
        shape = ModelConfig(
            32, 1, ("mixer_of_a_test",), {"mixer_of_a_test": {"num_heads": 2}}, vocab_size=258
        )
        export(build(shape, 0), bytes_tokenizer(), tmp_path / "hf")
        assert f"load_plugins(('{file.name}',))" in (tmp_path / "hf" / "README.md").read_text()
        import_hf(str(tmp_path / "hf"), tmp_path / "run", plugins=(str(file),))
    finally:
        del MIXERS["mixer_of_a_test"]
    with pytest.raises(
        SettingsError, match="'mixer_of_a_test', which is no mixer of this longfire.*model.plugins"
    ):
        load(tmp_path / "hf")
