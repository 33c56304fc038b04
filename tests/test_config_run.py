"""run.py: what follows from the settings, what cannot be, and that a saved run is the same run."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from longfire.config.run import Run
from longfire.config.run_folder import begun, changes, save
from longfire.config.summary import summary
from longfire.errors import CheckpointError, SettingsError
from longfire.launch import World
from longfire.mixers import MIXERS

SHAPE = {
    "model_type": "longfire",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["gla", "attention"],
    "gla": {"num_heads": 2},
    "attention": {"num_heads": 4},
    "max_position_embeddings": 512,
}
RECIPE = """
[model]
config = "shape.json"
[training]
seq_len = 64
batch_size = 4
steps = 100
[lr_scheduler]
warmup_steps = 10
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe folder; the working folder is another one."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "shape.json").write_text(json.dumps(SHAPE))
    (tmp_path / "recipes" / "x.toml").write_text(RECIPE)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def compose(folder: Path, **overrides: str) -> Run:
    return Run.compose(folder / "recipes" / "x.toml", overrides)


def test_the_words_are_known_without_data(folder):
    trained = {"tokenizer.path": "train", "tokenizer.train_vocab_size": "300"}
    assert compose(folder, **trained).vocab_size == 300
    assert compose(folder).vocab_size == 258  # bytes, <bos>, <eos>


def test_steps_rows_and_tokens(folder):
    run = compose(folder)
    assert (run.accumulation, run.sequences_per_step, run.tokens_per_step, run.steps) == (
        1,
        4,
        256,
        100,
    )
    run = compose(folder, **{"training.global_batch_size": "12"})
    assert (run.accumulation, run.sequences_per_step, run.tokens_per_step) == (3, 12, 768)
    run = compose(folder, **{"training.gradient_accumulation_steps": "5"})
    assert (run.accumulation, run.sequences_per_step) == (5, 20)
    run = compose(folder, **{"training.tokens": "25601"})  # one token more than 100 steps
    assert run.steps == 101


def test_the_summary_counts_in_steps_and_tokens(folder):
    """With flame's own worked number: 32 x 1 x 2048 x 8 = 524,288 tokens."""
    (folder / "recipes" / "shape.json").write_text(
        json.dumps({**SHAPE, "max_position_embeddings": 0})
    )
    run = compose(
        folder,
        **{
            "training.seq_len": "2048",
            "training.batch_size": "32",
            "training.global_batch_size": "256",
            "training.steps": "20480",
            "lr_scheduler.warmup_steps": "512",
        },
    )
    lines = "\n".join(summary(run))
    assert "524,288 tokens = 256 sequences of 2,048: 8 micro-batch(es) of 32" in lines
    assert "20,480 steps = 10,737,418,240 tokens" in lines  # 10.7B, not 10B
    assert "warm-up 512 steps = 268,435,456 tokens" in lines  # 0.27B, not 0.5B
    assert "1 gla, 1 attention" in lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.global_batch_size": "10"},
            "no multiple of batch_size x processes = 4 x 1 = 4, and it is never rounded: take 8 "
            "or 12, or a training.batch_size of 2 or 5",
        ),
        ({"training.global_batch_size": "3"}, "take 4, or a training.batch_size of 3"),
        (
            {"training.global_batch_size": "8", "training.gradient_accumulation_steps": "3"},
            "set gradient_accumulation_steps to 2",
        ),
        ({"training.step_plan": "4:100,4:90"}, "a later STEP"),
        (
            {"training.step_plan": "4:90", "training.steps": "80"},
            "plans 90 steps, more than the 80 of training.steps",
        ),
        ({"lr_scheduler.name": "wsd", "lr_scheduler.decay_ratio": "0.95"}, "takes 95 of 100 steps"),
        ({"training.seq_len": "1024"}, "longer than max_position_embeddings = 512"),
        ({"data.context_len": "8"}, "data.varlen = true"),
        ({"data.varlen": "true", "data.context_len": "65"}, "longer than training.seq_len"),
        ({"data.dataset": ""}, "names no source"),
        (
            {"data.dataset": "a,b,c", "data.dataset_name": "x,y"},
            "data.dataset_name has 2 entries for 3 sources",
        ),
        (
            {"data.dataset": "a,b", "data.data_probs": "1"},
            "data.data_probs has 1 entries for 2 sources",
        ),
        ({"data.dataset": "a,b", "data.data_probs": "1,0"}, "each share must be positive"),
        ({"data.streaming": "true", "data.shuffle": "global"}, 'use "window" or "auto"'),
        (
            {"data.dataset": "a", "data.record_format": "tokens", "data.fields": "[a],b"},
            "data.fields = '[a],b' is read of no source: data.record_format = ['tokens'] has no",
        ),
        (
            {"data.dataset": "a,b", "data.record_format": "text,", "data.document_end": "<eos>"},
            "data.document_end = '<eos>' is read of no source",
        ),
        (
            {"data.dataset": "a,embedded", "data.fields": "[a],b"},
            "data.dataset = embedded holds text, and it is to be read as fields",
        ),
        (
            {"data.dataset": "embedded", "data.record_format": "tokens"},
            "data.dataset = embedded holds text, and it is to be read as tokens",
        ),
        ({"data.validation_fraction": "0"}, "leaves nothing to evaluate"),
        (
            {"data.dataset": "embedded", "data.validation": "embedded"},
            "data.validation names embedded, which data.dataset trains on",
        ),
        ({"data.validation": "a,"}, "has an empty entry"),
        ({"eval.at_end": "false", "eval.compare_xz": "true"}, "set eval.at_end = true"),
        (
            {"checkpoint.enable_checkpoint": "false", "checkpoint.load_step": "3"},
            "enable_checkpoint = false",
        ),
        (
            {"checkpoint.load_step_again": "true"},
            "checkpoint.load_step once more, which is not set",
        ),
        (
            {"checkpoint.enable_checkpoint": "false", "checkpoint.model_weights_only": "true"},
            "enable_checkpoint = false",
        ),
        (
            {"checkpoint.create_seed_checkpoint": "true", "checkpoint.model_weights_only": "true"},
            "choose one",
        ),
        ({"checkpoint.folder": "../elsewhere"}, "must be a folder inside the run folder"),
        ({"metrics.save_tb_folder": "/tmp"}, "must be a folder inside the run folder"),
        (
            {"training.tensor_parallel_degree": "2"},
            "do not make up the 1 process(es) that run: start a multiple of 2",
        ),
        ({"model.config": "nowhere.json"}, "no such file"),
        ({"model.config": ""}, "model.config is empty"),
    ],
)
def test_what_cannot_be_is_reported_with_the_fix(folder, overrides, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        compose(folder, **overrides)


def test_sources_of_text_beside_those_of_records(folder):
    several = {"data.dataset": "a,b,embedded", "data.document_end": "<eos>"}
    compose(folder, **several, **{"data.record_format": "tokens,,text", "data.fields": "[a],b"})


def test_a_warm_up_that_is_longer_than_the_run_is_cut_and_said(folder):
    run = compose(folder, **{"training.steps": "12", "lr_scheduler.warmup_steps": "200"})
    assert run.warmup_steps == 2
    assert (
        "warm-up 2 steps = 512 tokens (a fifth of the run, which is no longer than the 200 steps asked for)"
        in summary(run)[-1]
    )
    assert compose(folder, **{"lr_scheduler.warmup_tokens": "25601"}).warmup_steps == 20
    assert compose(folder, **{"lr_scheduler.warmup_steps": "100"}).warmup_steps == 100


def test_the_summary_of_a_run_with_a_budget_and_of_its_repetition(folder):
    run = compose(folder, **{"training.max_seconds": "300"})
    assert any(
        "as many steps as 300 s of training allow, at most 100 steps" in line
        for line in summary(run)
    )
    run = compose(folder, **{"training.step_plan": "4:90,50:70"})
    assert run.steps == 70 and "70 steps = 17,920 tokens, as training.step_plan says" in "".join(
        summary(run)
    )


def test_all_problems_are_reported_at_once(folder):
    with pytest.raises(SettingsError) as error:
        compose(
            folder,
            **{
                "training.global_batch_size": "10",
                "data.data_probs": "1,2",
                "training.step_plan": "4",
            },
        )
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": {"num_heads": 5}},
            "hidden_size = 32 must be a positive multiple of num_heads = 5",
        ),
        ({"attention": {"num_heads": 4, "heads": 4}}, "attention.heads is unknown"),
        ({"attention": {}}, "num_heads"),
        ({"attention": 4}, "attention = 4 must be a table of its settings"),
        ({"attention": {"num_heads": "4"}}, "attention.num_heads = '4' must be a whole number"),
        (
            {"attention": {"num_heads": 4, "window_size": -1}},
            "attention.window_size = -1 must be 0 or more",
        ),
        ({"gla": {"num_heads": 2, "conv_size": 0}}, "gla.conv_size = 0 must be above 0"),
        (
            {"attention": {"num_heads": 4, "rope_theta": 0}},
            "attention.rope_theta = 0 must be above 0",
        ),
        ({"gla": {"num_heads": 2, "clamp_min": "low"}}, "gla.clamp_min = 'low' must be a number"),
        ({"layer_types": ["gla", "atention"]}, "'atention', which is no mixer of longfire"),
        ({"layer_types": ["gla", "attention", "gla"]}, "do not divide num_hidden_layers"),
    ],
)
def test_a_wrong_shape_is_reported_before_a_device_is_touched(folder, change, message):
    (folder / "recipes" / "shape.json").write_text(json.dumps({**SHAPE, **change}))
    with pytest.raises(SettingsError, match=re.escape(message)):
        compose(folder)


def test_a_trained_vocabulary_fits_the_shape(folder):
    (folder / "recipes" / "shape.json").write_text(json.dumps({**SHAPE, "vocab_size": 1000}))
    compose(folder)
    with pytest.raises(
        SettingsError, match=r"train_vocab_size = 4096 is more than vocab_size = 1000"
    ):
        compose(folder, **{"tokenizer.path": "train"})


def test_files_are_looked_for_beside_the_recipe_then_in_the_working_folder(folder):
    for name in ("recipes/one.jsonl", "work/one.jsonl", "work/two.jsonl"):
        (folder / name).write_text("")
    run = compose(folder, **{"data.dataset": "one.jsonl,two.jsonl,owner/set,*.jsonl,embedded"})
    assert run.data.dataset == (
        str(folder / "recipes" / "one.jsonl"),
        str(folder / "work" / "two.jsonl"),
        "owner/set",
        str(folder / "recipes" / "*.jsonl"),
        "embedded",
    )
    assert run.model.config == str(folder / "recipes" / "shape.json")
    (folder / "work" / "train").mkdir()
    assert compose(folder, **{"tokenizer.path": "train"}).tokenizer.path == "train"


def test_a_saved_run_is_the_same_run(folder, monkeypatch):
    (folder / "work" / "one.jsonl").write_text("")
    run = compose(
        folder,
        **{
            "data.dataset": "one.jsonl",
            "optimizer.lr": "0.1",
            "job.description": 'a "b"',
            "job.dump_folder": "out",
        },
    )
    save(run)
    save(run)
    assert (
        tomllib.loads((run.folder / "run.toml").read_text())["training"]["gc_freq"] == 50
    )  # defaults are written out
    saved = folder / "work" / "out"
    monkeypatch.chdir(folder)  # from anywhere
    again = Run.compose(saved / "run.toml", {})
    assert again.model_config == run.model_config and again.steps == run.steps
    expected, there = run.settings(), again.settings()
    expected["model"]["config"], expected["job"]["dump_folder"] = (
        str(saved / "config.json"),
        str(saved),
    )
    expected["data"]["folder"] = str(folder / "work" / "token-stores")
    assert there == expected
    save(again)
    assert Run.of_folder(saved) == again


def test_learning_rates_by_role_are_printed_and_a_tied_head_has_none_of_its_own(folder):
    given = {
        "optimizer.embedding_lr_scale": "10",
        "optimizer.head_lr_scale": "0.5",
        "optimizer.eps": "1e-10",
    }
    given |= {"optimizer.beta1": "0.8", "optimizer.weight_decay": "0"}
    run = compose(folder, **given)
    assert (run.optimizer.beta1, run.optimizer.eps, run.optimizer.weight_decay) == (0.8, 1e-10, 0.0)
    assert summary(run)[-1].endswith("tokens; embedding x 10, head x 0.5")
    assert summary(compose(folder))[-1].endswith("tokens")
    (folder / "recipes" / "shape.json").write_text(
        json.dumps({**SHAPE, "tie_word_embeddings": True})
    )
    with pytest.raises(
        SettingsError,
        match=r"tie_word_embeddings = true in \S+shape.json the head is the embedding",
    ):
        compose(folder, **given)
    with pytest.raises(SettingsError, match="are all 0, so nothing would learn"):
        compose(
            folder,
            **{
                f"optimizer.{role}_lr_scale": "0"
                for role in ("embedding", "head", "matrix", "other")
            },
        )
    with pytest.raises(SettingsError, match="optimizer.matrix_lr_scale = -1"):
        compose(folder, **{"optimizer.matrix_lr_scale": "-1"})


def test_a_mixer_that_does_not_say_what_ends_it_is_refused_where_that_is_asked(folder, monkeypatch):
    monkeypatch.setattr(MIXERS["attention"], "roles", {"q_proj": "column"})
    compose(folder)
    (folder / "recipes" / "shape.json").write_text(json.dumps({**SHAPE, "init_outputs": "zeros"}))
    with pytest.raises(
        SettingsError, match="the mixer attention does not say which matrix ends it"
    ):
        compose(folder)


def test_a_run_folder_may_be_moved(folder):
    save(compose(folder, **{"job.dump_folder": "out"}))
    (folder / "work" / "out").rename(folder / "moved")
    run = Run.of_folder(folder / "moved", {"training.batch_size": "2"})
    assert run.folder == folder / "moved" and run.training.batch_size == 2
    assert run.model.config == str(folder / "moved" / "config.json")


def test_no_run_there(folder):
    with pytest.raises(SettingsError, match=r"is no run folder: it has no run\.toml"):
        Run.of_folder(folder)


def test_checkpoints_of_another_model_are_not_trained_on(folder):
    save(compose(folder, **{"job.dump_folder": "out"}))
    (folder / "recipes" / "shape.json").write_text(json.dumps({**SHAPE, "hidden_size": 64}))
    save(compose(folder, **{"job.dump_folder": "out"}))  # nothing was trained yet
    (folder / "work" / "out" / "checkpoints" / "step-3").mkdir(parents=True)
    (folder / "recipes" / "shape.json").write_text(json.dumps(SHAPE))
    with pytest.raises(SettingsError, match="hidden_size is 64 there and 32 here"):
        save(compose(folder, **{"job.dump_folder": "out"}))


def test_weights_to_start_from_are_there_when_a_run_starts_and_not_needed_when_it_goes_on(folder):
    changes = {"job.dump_folder": "out", "model.weights": "llama"}
    with pytest.raises(SettingsError, match=r"model\.weights = 'llama' is no folder"):
        compose(folder, **changes)
    (folder / "work" / "llama").mkdir()
    save(compose(folder, **changes))
    (folder / "work" / "out" / "checkpoints" / "step-3").mkdir(parents=True)
    (folder / "work" / "llama").rmdir()
    assert Run.of_folder(folder / "work" / "out").model.weights


def test_a_run_that_goes_on_tells_what_was_changed(folder):
    run = compose(folder, **{"job.dump_folder": "out"})
    save(run)
    other = {"job.dump_folder": "out", "optimizer.lr": "0.5", "data.data_probs": "2"}
    assert changes(compose(folder, **other)) == [], "nothing was trained yet"
    (folder / "work" / "out" / "checkpoints" / "step-0").mkdir(parents=True)
    assert changes(compose(folder, **other)) == [], "an imported run was not started yet"
    (folder / "work" / "out" / "data.json").write_text("{}")
    assert changes(run) == []
    message = "changed since this run was last started: "
    lines = changes(compose(folder, **other))
    assert lines == [
        f"{message}data.data_probs = [2.0], was []",
        f"{message}optimizer.lr = 0.5, was 0.0003",
    ]


def test_one_process_at_a_time_trains_into_a_run_folder(folder):
    first, second = (
        compose(folder, **{"job.dump_folder": "out"}),
        compose(folder, **{"job.dump_folder": "out"}),
    )
    for _ in range(2):  # the first lets it go when it ends
        with begun(first):
            assert (first.folder / "run.toml").exists()
            with (
                pytest.raises(
                    SettingsError,
                    match=r"'out' is being trained into by process \d+ on .*another folder",
                ),
                begun(second),
            ):
                pass
    with begun(second):
        pass


def test_a_folder_that_cannot_be_written_is_reported(folder):
    (folder / "work" / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"run.toml: cannot be written|config.json: cannot be written"
    ):
        save(compose(folder, **{"job.dump_folder": "file/run"}))


def test_a_config_of_hugging_face_is_read(folder):
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 128,
    }
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps(llama))
    run = compose(folder, **{"model.config": str(folder / "llama")})
    assert (
        run.model_config.layer_types == ("attention", "attention")
        and run.model_config.mixers["attention"]["num_kv_heads"] == 2
    )
    save(run)
    assert Run.of_folder(run.folder).model_config == run.model_config


def test_prepare_needs_no_model(folder):
    assert Run.compose(None, {}, needs_model=False).model_config is None


def test_rows_of_a_step_are_those_of_all_processes_with_rows_of_their_own(folder):
    def of_world(size: int, **overrides: str) -> Run:
        return Run.compose(folder / "recipes" / "x.toml", overrides, world=World(size))

    assert of_world(8).sequences_per_step == 32 and of_world(8).degrees["dp_shard"] == 8
    run = of_world(8, **{"parallelism.mesh_dim": "2,-1,1,1", "training.global_batch_size": "64"})
    assert (run.data_processes, run.accumulation, run.sequences_per_step) == (8, 2, 64)
    assert "8 processes (2 dp_replicate x 4 dp_shard)" in "".join(summary(run))
    with pytest.raises(
        SettingsError,
        match="tensor_parallel_degree = 3.*do not make up the 8 process.*start a multiple of 3",
    ):
        of_world(8, **{"parallelism.tensor_parallel_degree": "3"})
    with pytest.raises(
        SettingsError,
        match="param_gather_dtype = 'bfloat16' is about sharded parameters, but nothing is sharded",
    ):
        compose(folder, **{"parallelism.param_gather_dtype": "bfloat16"})


def test_who_reads_a_run_is_alone_whatever_its_plan(folder):
    given = {
        "parallelism.data_parallel_replicate_degree": "4",
        "job.dump_folder": str(folder / "made"),
    }
    save(Run.compose(folder / "recipes" / "x.toml", given, world=World(4)))
    assert Run.of_folder(folder / "made").data_processes == 1


def test_a_recipe_of_ones_own_that_is_called_run_toml_keeps_its_dump_folder(folder):
    own = folder / "recipes" / "run.toml"
    own.write_text('[job]\ndump_folder = "elsewhere"\n' + RECIPE)
    assert Run.compose(own, {}).folder == Path("elsewhere")


def test_data_dir_of_the_environment_is_where_data_and_stores_are(folder, tmp_path, monkeypatch):
    place = tmp_path / "scratch"
    (place / "openwebtext").mkdir(parents=True)
    monkeypatch.setenv("DATA_DIR", str(place))
    run = compose(folder, **{"data.dataset": "openwebtext,owner/name", "data.validation": "*.txt"})
    assert run.data.dataset == (str(place / "openwebtext"), "owner/name")
    assert run.data.folder == str(place / "token-stores")
    assert compose(folder, **{"data.folder": "mine"}).data.folder == "mine"
    Path("token-stores").mkdir()
    assert compose(folder).data.folder == "token-stores", "stores that are here are used"
