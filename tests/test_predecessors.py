"""The command lines that users of the four earlier frameworks have in their scripts, as they are written, with small stand-ins for
data, tokenizer and model under the names that the lines give; further overrides make them small."""

import json
import os
import random
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets
import pytest
import torch
import transformers

from longfire.checkpoint.weights import open_model
from longfire.cli import main
from longfire.cli.arguments import RecipeParser, read_run
from longfire.cli.train import train as train_command
from longfire.config import shipped
from longfire.config.aliases import translate
from longfire.config.run import Run
from longfire.data.tokenizer_training import train_tokenizer
from longfire.errors import SettingsError
from longfire.launch import World
from longfire.messages import show_messages
from longfire.training.schedule import schedule

ROOT = Path(__file__).parents[1]
WORDS = ["fire", "long", "river", "stone", "tree", "wind", "cloud", "light", "deep", "blue"]

FLAME_ACCELERATE = """
type=gla lr=3e-4 scheduler=cosine_with_min_lr batch=32 update=1 warmup=1024 steps=20480 context=2048 gpus={processes} nodes=1
path=exp/gla-340M-10B project=fla model=configs/gla_340M.json data=HuggingFaceFW/fineweb-edu name=sample-10BT
cache=data/HuggingFaceFW/fineweb-edu/sample-10BT/train
"""
FLAME_TORCHTITAN = """
--job.config_file train.toml
--job.dump_folder exp/transformer-340M-10B/batch32.seqlen2048.warmup1024.update1.steps20480.lr3e-4
--model.config configs/transformer_340M.json --model.tokenizer_path fla-hub/transformer-1.3B-100B --optimizer.name AdamW
--optimizer.lr 3e-4 --optimizer.min_lr_ratio 0.1 --optimizer.scheduler cosine --training.batch_size 32 --training.seq_len 2048
--training.warmup_steps 1024 --training.gradient_accumulation_steps 1 --training.steps 20480 --training.max_norm 1.0
--training.skip_nan_inf --training.dataset HuggingFaceFW/fineweb-edu --training.dataset_name default --training.dataset_split train
--training.streaming --training.num_workers 32 --training.prefetch_factor 2 --training.seed 42 --checkpoint.interval 2048
--checkpoint.load_step -1 --metrics.log_freq 4
"""
TRAIN_TOML = """
[job]
print_args = true
[model]
tokenizer_path = "fla-hub/transformer-1.3B-100B"
[optimizer]
name = "AdamW"
eps = 1e-15
[training]
context_len = 2048
pin_memory = false
persistent_workers = false
varlen = false
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
disable_loss_parallel = false
compile = false
[metrics]
enable_wandb = false
[experimental]
context_parallel_degree = 1
pipeline_parallel_degree = 1
[float8]
enable_float8_linear = false
[checkpoint]
enable_checkpoint = true
folder = "checkpoint"
async_mode = "disabled"
"""
RING_ATTENTION = """
--mesh_dim='{mesh}' --dtype='bf16' --total_steps=480000 --log_freq=200 --save_model_freq=0 --save_milestone_freq=1000
--load_llama_config='{size}' --update_llama_config="dict(max_sequence_length={length},scan_attention=True,
scan_query_chunk_size=2048,scan_key_chunk_size=4096,remat_attention='nothing_saveable',scan_mlp=True,scan_mlp_chunk_size=2048,
remat_mlp='nothing_saveable',remat_block='nothing_saveable',scan_layers=True,attention_type='{attention}',param_scan_axis=0,
mesh_dim='{mesh}')" --load_dataset_state='' --load_checkpoint='' --tokenizer.vocab_file="" --optimizer.type='adamw'
--optimizer.adamw_optimizer.weight_decay=0.1 --optimizer.adamw_optimizer.lr=1.5e-4 --optimizer.adamw_optimizer.end_lr=1.5e-5
--optimizer.adamw_optimizer.lr_warmup_steps=2000 --optimizer.adamw_optimizer.lr_decay_steps=480000 --train_dataset.type='json'
--train_dataset.text_processor.fields='text' --train_dataset.json_dataset.path="data.jsonl"
--train_dataset.json_dataset.seq_length={length} --train_dataset.json_dataset.batch_size={batch}
--train_dataset.json_dataset.tokenizer_processes=16 --checkpointer.save_optimizer_state=True
"""
LINES_OF_RING_ATTENTION = {  # README's two
    "13b": {
        "mesh": "1,64,4,1",
        "size": "13b",
        "length": 32768,
        "attention": "blockwise",
        "batch": 64,
    },
    "7b": {
        "mesh": "1,1,4,64",
        "size": "7b",
        "length": 2097152,
        "attention": "ring_blockwise",
        "batch": 1,
    },
}
SMALL_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}


def words_of(line: str, **values: object) -> list[str]:
    """The words of a line as a shell reads it."""
    return shlex.split(line.format(**values).replace(",\n", ","))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with stand-ins under the names that the lines give."""
    monkeypatch.chdir(tmp_path)
    chooser = random.Random(1)
    texts = [" ".join(chooser.choices(WORDS, k=200)) for _ in range(200)]
    text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    dataset = tmp_path / "HuggingFaceFW/fineweb-edu"
    for name in ("sample", "data"):
        (dataset / name).mkdir(parents=True)
        (dataset / name / "train.jsonl").write_text(text)
    (dataset / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: default\n  data_files: data/*.jsonl\n"
        "- config_name: sample-10BT\n  data_files: sample/*.jsonl\n---\n"
    )
    (tmp_path / "data.jsonl").write_text(text)
    (tmp_path / "configs").mkdir()
    for name, model_type in (("gla_340M", "gla"), ("transformer_340M", "transformer")):
        config = {"model_type": model_type, **SMALL_MODEL}
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config))
    tokenizer = tmp_path / "fla-hub/transformer-1.3B-100B"
    tokenizer.mkdir(parents=True)
    train_tokenizer(texts, 280).save(tokenizer)
    (tmp_path / "train.toml").write_text(TRAIN_TOML)
    return tmp_path


def run_of(words: list[str], processes: int = 1) -> Run:
    """The run that a line describes, without training it."""
    parser = RecipeParser("train", train_command, "")
    run, _ = read_run(parser, words, world=World(processes))
    return run


def started(words: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    """A line through scripts/train.sh."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NGPU": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(ROOT / "scripts/train.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def saved_settings(run_folder: str) -> dict:
    return tomllib.loads((Path(run_folder) / "run.toml").read_text())


def steps_saved(run_folder: str, checkpoints: str = "checkpoints") -> list[int]:
    names = [path.name for path in (Path(run_folder) / checkpoints).glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names)


def rates(run_folder: str) -> list[float]:
    """The learning rate of each step."""
    lines = (Path(run_folder) / "metrics.jsonl").read_text().splitlines()
    return [record["lr"] for record in map(json.loads, lines) if "lr" in record]


def smaller(words: list[str], **values: object) -> list[str]:
    """The same words with other values: `name=value` and `--name value` alike."""
    changed = []
    values = {name.replace("__", "."): str(value) for name, value in values.items()}
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        if name not in values:
            changed.append(word)
        elif equals:
            changed.append(f"{word.partition('=')[0]}={values[name]}")
        else:
            words.pop(0)
            changed += [word, values[name]]
    return changed


SMALL_GLA = {"batch": 2, "warmup": 2, "steps": 4, "context": 64}


def test_the_line_of_flame_on_accelerate(folder):
    words = words_of(FLAME_ACCELERATE, processes=1)
    run = run_of(words)
    assert run.tokens_per_step == 32 * 2048 and run.steps == 20480 and run.warmup_steps == 1024
    assert run.optimizer.weight_decay == 0.01 and run.checkpoint.keep_latest_k == 1
    assert run.checkpoint.interval == 2048 and run.lr_scheduler.min_lr_ratio == 0.1
    small = smaller(words, **SMALL_GLA)
    assert main(["train", *small]) == 0
    assert steps_saved("exp/gla-340M-10B") == [4]
    assert rates("exp/gla-340M-10B")[1:3] == [3e-4, 3e-4]
    assert list(Path("data/HuggingFaceFW/fineweb-edu/sample-10BT/train").iterdir())
    resumed = [*smaller(small, steps=6), "checkpoint=exp/gla-340M-10B/checkpoint-4"]
    assert main(["train", *resumed]) == 0
    assert len(rates("exp/gla-340M-10B")) == 6


def test_rows_of_ids_that_preprocess_saved_are_trained_on(folder):
    """`datasets` has saved them under the name that `cache` gives."""
    rows = [[7, *range(40, 103)] for _ in range(64)]
    saved = Path("data/HuggingFaceFW/fineweb-edu/sample-10BT/train")
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(saved))
    words = smaller(words_of(FLAME_ACCELERATE, processes=1), **SMALL_GLA)
    assert main(["train", *words]) == 0
    given = saved_settings("exp/gla-340M-10B")["data"]
    assert given["record_format"] == ["tokens"] and given["dataset"] == [str(saved.absolute())]


def test_what_a_line_of_flame_leaves_out_has_its_defaults(folder, capsys):
    show_messages()
    run = run_of(["type=gla", "model=configs/gla_340M.json", "data=data.jsonl", "steps=64"])
    assert "what the line leaves out is as there: optimizer.lr = '3e-4'" in capsys.readouterr().out
    assert run.training.batch_size == 32 and run.training.seq_len == 2048 and run.steps == 64
    assert run.lr_scheduler.warmup_steps == 1024 and run.optimizer.weight_decay == 0.01


@pytest.mark.parametrize("name", ["warmup_stable_decay", "constant", "constant_with_warmup"])
def test_the_schedules_of_a_line_of_flame_are_those_of_transformers(folder, name):
    """As `Trainer` makes them, with what flame gives of the phases of warmup_stable_decay; after
    the warm-up, which begins at the first step's share here, not at 0."""
    steps, warmup = 100, 20
    words = [*smaller(words_of(FLAME_ACCELERATE, processes=1), steps=steps, warmup=warmup)]
    run = run_of([*smaller(words, scheduler=name)])
    given = run.lr_scheduler
    ours = [schedule(step, steps, given.warmup_steps, given) for step in range(steps)]
    phases = {"num_stable_steps": 0.9 * steps - warmup, "num_decay_steps": 0.1 * steps}
    theirs = transformers.get_scheduler(
        name,
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        num_warmup_steps=warmup,
        num_training_steps=None if name == "warmup_stable_decay" else steps,
        scheduler_specific_kwargs=phases if name == "warmup_stable_decay" else None,
    )
    for step in range(steps):
        if step >= given.warmup_steps:
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        theirs.optimizer.step()
        theirs.step()


def test_what_a_line_of_flame_says_of_its_schedule_wins(folder):
    words = smaller(words_of(FLAME_ACCELERATE, processes=1), scheduler="warmup_stable_decay")
    words += ["lr_scheduler.min_lr_ratio=0.2", "lr_scheduler.decay_shape=linear"]
    given = run_of(words).lr_scheduler
    assert (given.min_lr_ratio, given.decay_shape) == (0.2, "linear")


def test_wsd_of_flame_on_torchtitan_falls_by_the_square_root(folder):
    words = smaller(words_of(FLAME_TORCHTITAN), optimizer__scheduler="wsd")
    assert run_of(words).lr_scheduler.decay_shape == "sqrt"
    assert run_of([*words, "--lr_scheduler.decay_shape=cosine"]).lr_scheduler.decay_shape == (
        "cosine"
    )


@pytest.mark.parametrize("processes", [2])
def test_the_line_of_flame_on_accelerate_starts_its_processes(folder, processes):
    words = smaller(words_of(FLAME_ACCELERATE, processes=processes), **SMALL_GLA)
    ended = started(words, processes=1)
    assert ended.returncode == 0, ended.stderr
    assert f"on {processes} processes" in ended.stdout and steps_saved("exp/gla-340M-10B") == [4]


def test_a_wrong_word_is_one_message_of_one_process(folder):
    words = smaller(words_of(FLAME_ACCELERATE, processes=2), lr="fast")
    ended = started(words, processes=1)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2 and said.count("optimizer.lr = 'fast' must be a number") == 1
    assert "Traceback" not in said


def test_processes_that_were_not_started_are_refused(folder, capsys):
    assert main(["train", *words_of(FLAME_ACCELERATE, processes=8)]) == 2
    assert "gpus = '8', but what was started has processes of this machine: 1" in (
        capsys.readouterr().err
    )


def test_the_line_of_flame_on_torchtitan(folder):
    words = words_of(FLAME_TORCHTITAN)
    run = run_of(words, processes=8)
    assert run.tokens_per_step == 8 * 32 * 2048 and run.steps == 20480
    assert run.tokenizer.path == str(folder / "fla-hub/transformer-1.3B-100B")
    small = smaller(
        words,
        training__batch_size=2,
        training__seq_len=64,
        training__warmup_steps=2,
        training__steps=4,
        training__num_workers=1,
        checkpoint__interval=2,
    )
    ended = started(small, processes=2)
    assert ended.returncode == 0, ended.stderr
    out = "exp/transformer-340M-10B/batch32.seqlen2048.warmup1024.update1.steps20480.lr3e-4"
    assert steps_saved(out, "checkpoint") == [2, 4]
    assert "tokenizer: " in ended.stdout and "280 entries" in ended.stdout


@pytest.mark.parametrize("line", LINES_OF_RING_ATTENTION)
def test_the_lines_of_ring_attention_mean_what_they_meant(folder, line):
    values = LINES_OF_RING_ATTENTION[line]
    replicas, shards, tensor, context = map(int, values["mesh"].split(","))
    run = run_of(words_of(RING_ATTENTION, **values), processes=256)
    assert run.tokens_per_step == 2**21, "of all devices together"
    degrees = (run.degrees["dp_replicate"], run.degrees["dp_shard"], run.degrees["tp"])
    assert (*degrees, run.degrees["cp"]) == (replicas, shards, tensor, context)
    assert run.lr_scheduler.min_lr_ratio == pytest.approx(0.1)
    assert run.lr_scheduler.decay_end_step == run.steps == 480000
    assert run.model_config.max_position_embeddings == values["length"]
    assert run.attention.kind == "blockwise" and run.training.mlp_chunk_size == 2048
    assert run.checkpoint.milestone_interval == 1000


def test_a_small_line_of_ring_attention_is_trained(folder):
    values = {"mesh": "1,1,1,1", "size": "debug", "length": 64, "attention": "blockwise"}
    words = smaller(
        words_of(RING_ATTENTION, batch=4, **values),
        dtype="fp32",
        total_steps=6,
        save_milestone_freq=2,
        optimizer__adamw_optimizer__lr_warmup_steps=2,
        optimizer__adamw_optimizer__lr_decay_steps=5,
        train_dataset__json_dataset__tokenizer_processes=1,
    )
    words.append("--logger.output_dir=out")
    words[6:8] = [word.replace("dict(", "dict(num_hidden_layers=1,") for word in words[6:8]]
    assert main(["train", *words]) == 0
    assert steps_saved("out") == [2, 4, 6], "milestones are saved, not only kept"
    rate = rates("out")
    assert rate[1] == pytest.approx(1.5e-4) and rate[-1] == pytest.approx(1.5e-5)
    given = saved_settings("out")
    assert given["training"]["global_batch_size"] == 4


@pytest.mark.parametrize(
    ("name", "config", "sequences", "seq_len", "lr"),
    [
        ("owt/gpt2s-flash", "gpt2-s", 512, 1024, 6e-4),
        ("owt/gpt2m-flash", "gpt2-m", 512, 1024, 1.5e-4),
        ("owt/gpt2l-hf", "gpt2-l", 512, 1024, 1.5e-4),
        ("owt/gpt2xl-flash", "gpt2-xl", 512, 1024, 1.5e-4),
        ("pile/gpt3s-flash", "gpt3-s", 256, 2048, 6e-4),
        ("pile/gpt3m-flash-rotary", "gpt3-m-rotary", 256, 2048, 3e-4),
        ("pile/gpt3l-flash-8k", "gpt3-l-8k", 64, 8192, 2.5e-4),
        ("pile/gpt3xl-flash-rotary-60B", "gpt3-xl-rotary", 512, 2048, 2e-4),
        ("pile/gpt3l-flash-rotary-30B", "gpt3-l-rotary", 256, 2048, 2.5e-4),
        ("pile/gpt3-2.7B-flash-hdim128", "gpt3-2.7b-hdim128", 512, 2048, 1.6e-4),
    ],
)
def test_experiments_of_flash_attention(folder, name, config, sequences, seq_len, lr):
    words = [f"experiment={name}", "trainer.precision=bf16", "datamodule.batch_size=4"]
    run = run_of(words, processes=8)
    assert Path(run.model.config) == shipped.models()[config]
    assert run.sequences_per_step == sequences and run.training.batch_size == 4
    assert run.training.seq_len == seq_len and run.optimizer.lr == lr
    assert run.folder.name.startswith(config)
    if name.endswith("0B"):  # as its yaml files have it; the names are rounded
        assert (run.steps, run.lr_scheduler.warmup_steps) == (60_000, 600)
        assert run.lr_scheduler.decay_end_step == 0, "the last step"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_small_experiment_of_flash_attention_is_trained(folder, processes):
    """Its words for a smaller model, and the shape of its learning rate."""
    words = [
        *["experiment=owt/gpt2s-flash", f"trainer.devices={processes}", "trainer.max_steps=4"],
        *["model.config.n_embd=32", "model.config.n_layer=2", "model.config.n_head=2"],
        *["datamodule.max_length=64", "datamodule.batch_size=2", "train.global_batch_size=8"],
        *["datamodule.dataset_name=data.jsonl", "tokenizer=fla-hub/transformer-1.3B-100B"],
        *["train.scheduler.num_warmup_steps=2", "datamodule.num_workers=1", "trainer.precision=32"],
        *["callbacks.model_checkpoint.every_n_train_steps=2", "datamodule.val_ratio=0.02"],
        *["model.config.vocab_size=280"],
    ]
    ended = started(words, processes=1)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
    assert f"on {processes} process" in ended.stdout
    assert steps_saved("runs/gpt2-s-owt") == [2, 4]
    found = rates("runs/gpt2-s-owt")
    assert found == pytest.approx([3e-4, 6e-4, 6e-4, 3e-4]), "linear, to 0 after the last step"
    saved = saved_settings("runs/gpt2-s-owt")
    assert saved["training"]["global_batch_size"] == 8


def test_an_unknown_experiment_names_those_that_there_are(folder, capsys):
    assert main(["train", "experiment=owt/gpt5-flash"]) == 2
    assert "owt/gpt2{s,m,l,xl}-flash" in capsys.readouterr().err


def test_an_experiment_says_what_its_words_mean_once(folder, capsys):
    """Also words that Hydra adds with a plus."""
    words = ["experiment=owt/gpt2s-flash", "+trainer.max_steps=10", "datamodule.batch_size=4"]
    show_messages()
    run = run_of(words)
    assert run.steps == 10
    assert capsys.readouterr().out.count("trainer.max_steps = '10' is now") == 1


def test_a_wrong_word_beside_an_experiment_is_named(folder, capsys):
    assert main(["train", "experiment=owt/gpt2s-flash", "trainer.max_epoch=1"]) == 2
    assert "unknown setting 'trainer.max_epoch'" in capsys.readouterr().err


def test_evaluations_of_an_experiment_are_not_counted_in_unknown_micro_batches(folder, capsys):
    words = ["experiment=owt/gpt2s-flash", "trainer.val_check_interval=1000"]
    assert main(["train", *words]) == 2
    assert "write eval.interval, in steps" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(folder, capsys):
    words = words_of(FLAME_ACCELERATE, processes=1)
    assert main(["train", *words, "checkpoint=exp/other/checkpoint-4"]) == 2
    assert "is not of the run folder 'exp/gla-340M-10B'" in capsys.readouterr().err
    without_path = [word for word in words if not word.startswith("path=")]
    run = run_of([*without_path, "checkpoint=exp/other/checkpoint-4"])
    assert run.folder == Path("exp/other") and run.checkpoint.load_step == 4


def test_flame_s_own_checkpoint_cannot_be_resumed(folder, capsys):
    saved = Path("exp/gla-340M-10B/checkpoint-4")
    saved.mkdir(parents=True)
    (saved / "model.safetensors").touch()
    words = words_of(FLAME_ACCELERATE, processes=1)
    assert main(["train", *words, f"checkpoint={saved}"]) == 2
    assert "write model.weights = that folder" in capsys.readouterr().err


def test_bytes_instead_of_a_large_vocabulary_are_a_warning(folder, capsys):
    """flame's line names no tokenizer: its own default was one of the hub."""
    config = Path("configs/gla_340M.json")
    config.write_text(json.dumps({"model_type": "gla", **SMALL_MODEL, "vocab_size": 32000}))
    words = words_of(FLAME_ACCELERATE, processes=1)
    show_messages()
    run_of(words)
    assert "258 of the 32,000 entries" in capsys.readouterr().err
    run_of([*words, "tokenizer=bytes"])
    assert not capsys.readouterr().err


def test_points_where_a_pipeline_is_split_are_several_words(folder):
    words = [
        *smaller(words_of(FLAME_TORCHTITAN), training__batch_size=4),
        *["--experimental.pipeline_parallel_degree", "2"],
        *["--experimental.pipeline_parallel_microbatches", "4"],
        *["--experimental.pipeline_parallel_split_points", "layers.1"],
    ]
    assert run_of(words, processes=2).parallelism.pipeline_parallel_split_points == ("layers.1",)
    parser = RecipeParser("train", train_command, "")
    parser.parse([*words, "layers.2", "--training.steps", "4"])
    key = "experimental.pipeline_parallel_split_points"
    assert parser.overrides[key] == "layers.1,layers.2"


def test_evaluations_of_ring_attention_come_every_so_many_optimizer_steps(folder):
    values = {"mesh": "1,1,1,1", "size": "debug", "length": 64, "attention": "blockwise"}
    words = words_of(RING_ATTENTION, batch=4, **values)
    run = run_of([*words, "--eval_steps=10", "--optimizer.accumulate_gradient_steps=4"])
    assert run.eval.interval == 50 and run.eval.tokens == 10 * 8 * 1024


def test_a_state_of_ring_attention_s_spelling_resumes_a_run_folder(folder, capsys):
    saved = Path("out/checkpoints/step-4")
    saved.mkdir(parents=True)
    assert translate("load_checkpoint", f"trainstate_params::{saved}", "", {})[0] == {
        "model.weights": str(saved)
    }
    with pytest.raises(SettingsError, match="resumes by itself"):
        translate("load_checkpoint", f"trainstate::{saved}", "", {})
    Path("out/run.toml").touch()
    meaning, _ = translate("load_checkpoint", f"trainstate::{saved}", "", {})
    assert meaning == {"job.dump_folder": "out", "checkpoint.load_step": 4}
    meaning, _ = translate("load_checkpoint", "trainstate::out", "", {"logger.output_dir": "out"})
    assert meaning == {"checkpoint.load_step": -1}


def test_words_of_hf2jax_name_the_source_and_the_run_folder(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--checkpoint_dir", "weights", "--output_file", "out", "--model_size", "7b"]
    Path("weights").mkdir()
    assert main(["import", *words, "--streaming"]) != 0
    assert "weights" in capsys.readouterr().err, "the folder is read, and has no config.json"
    assert main(["import", "weights"]) == 2
    assert "RUN is missing" in capsys.readouterr().err
    assert main(["import", "weights", *words]) == 2
    assert "SOURCE and --checkpoint_dir mean the same" in capsys.readouterr().err


def test_a_plan_and_a_preparation_take_the_words_of_a_launcher(folder, capsys):
    """They start no processes: a plan is one for as many as the words say."""
    words = smaller(words_of(FLAME_ACCELERATE, processes=4), nodes=2, **SMALL_GLA)
    parser = RecipeParser("plan", train_command, "")
    parser.add_argument("--gpus", type=int, default=1)
    run, _ = read_run(parser, words, world=None)
    assert run.world.size == 8
    assert main(["prepare", *words]) == 0
    assert main(["prepare", *smaller(words, gpus="all")]) == 2
    assert "gpus = 'all' must be a whole number" in capsys.readouterr().err


SIX_DATASETS = (
    "HuggingFaceFW/fineweb-edu,opencsg/Fineweb-Edu-Chinese-V2.1,"
    "OpenCoder-LLM/opc-fineweb-code-corpus/discussions,math-ai/AutoMathText,"
    "EleutherAI/proof-pile-2,OpenCoder-LLM/opc-fineweb-math-corpus"
)


def test_the_six_datasets_of_flame_on_torchtitan(folder):
    """Each gives its share of the batches."""
    for name in SIX_DATASETS.split(","):
        Path(name).mkdir(parents=True, exist_ok=True)
        if not list(Path(name).iterdir()):
            (Path(name) / "train.jsonl").write_text(Path("data.jsonl").read_text())
    words = smaller(
        words_of(FLAME_TORCHTITAN),
        training__batch_size=2,
        training__seq_len=64,
        training__warmup_steps=2,
        training__steps=2,
        training__num_workers=1,
        training__dataset=SIX_DATASETS,
    )
    position = words.index("--training.dataset_name")
    del words[position : position + 2]
    probabilities = "0.6,0.15,0.15,0.014,0.058,0.028"
    words += ["--training.data_probs", probabilities]
    assert main(["train", *words]) == 0
    out = "exp/transformer-340M-10B/batch32.seqlen2048.warmup1024.update1.steps20480.lr3e-4"
    given = saved_settings(out)["data"]
    assert len(given["dataset"]) == 6 and given["streaming"]
    assert given["data_probs"] == [float(share) for share in probabilities.split(",")]
    assert steps_saved(out, "checkpoint") == [2]


def test_the_line_of_flame_with_wsd_is_trained(folder):
    """A rise, a plateau, and the fall of transformers' warmup_stable_decay."""
    words = smaller(
        words_of(FLAME_ACCELERATE, processes=1),
        scheduler="warmup_stable_decay",
        **{**SMALL_GLA, "steps": 40},
    )
    assert main(["train", *words]) == 0
    found = rates("exp/gla-340M-10B")
    assert len(found) == 40 and steps_saved("exp/gla-340M-10B")[-1] == 40
    highest = found.count(max(found))
    assert max(found) == pytest.approx(3e-4) and highest > 30, "a plateau"
    assert found[0] < found[1] and found[-1] < found[-2] < max(found)


def test_a_model_converted_from_llama_is_trained_by_the_line_of_7b(folder):
    """convert_from_llama.py and then the README's line, of a small model of the same family."""
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=280,
    )
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config)
    model.save_pretrained("mistralai/Mistral-7B-v0.1")
    tokenizer = Path("fla-hub/transformer-1.3B-100B")
    for path in tokenizer.iterdir():
        (Path("mistralai/Mistral-7B-v0.1") / path.name).write_bytes(path.read_bytes())
    wanted = {
        "model_type": "gla",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "feature_map": "relu",
        "expand_k": 1.0,
        "vocab_size": 280,
        "tie_word_embeddings": False,
    }
    Path("configs/gla_7B.json").write_text(json.dumps(wanted))
    words = ["--model", "mistralai/Mistral-7B-v0.1", "--config", "configs/gla_7B.json"]
    assert main(["convert", *words, "--output", "converted/gla-7B"]) == 0
    embedding = model.model.embed_tokens.weight
    line = (
        "type=gla lr=3e-5 steps=10240 batch=4 update=8 warmup=512 context=2048 path=exp/gla-7B-20B"
        " project=fla model=converted/gla-7B data=SlimPajama-627B cache=data/SlimPajama-627B/train"
    )
    Path("SlimPajama-627B").mkdir()
    Path("SlimPajama-627B/train.jsonl").write_text(Path("data.jsonl").read_text())
    assert run_of(words_of(line)).tokens_per_step == 4 * 8 * 2048
    small = smaller(words_of(line), steps=1, batch=1, update=2, warmup=1, context=64, lr="1e-9")
    assert main(["train", *small]) == 0
    assert saved_settings("exp/gla-7B-20B")["tokenizer"]["path"].endswith("gla-7B")
    saved = open_model(Path("exp/gla-7B-20B"), 1).model
    torch.testing.assert_close(saved.embed.weight, embedding, rtol=0, atol=1e-7)


def test_the_ring_line_of_ring_attention_on_two_processes(folder):
    """README's second line: two processes share each sequence, and the losses are those of one."""
    losses = []
    for processes in (1, 2):
        mesh = f"1,1,1,{processes}"
        values = {"mesh": mesh, "size": "debug", "length": 64, "attention": "ring_blockwise"}
        words = smaller(
            words_of(RING_ATTENTION, batch=2, **values),
            dtype="fp32",
            total_steps=2,
            log_freq=1,
            save_milestone_freq=0,
            optimizer__adamw_optimizer__lr_warmup_steps=1,
            optimizer__adamw_optimizer__lr_decay_steps=2,
            train_dataset__json_dataset__tokenizer_processes=1,
        )
        words.append(f"--logger.output_dir=out{processes}")
        ended = started(words, processes=processes)
        assert ended.returncode == 0, ended.stderr
        lines = Path(f"out{processes}/metrics.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "lr" in record])
    assert len(losses[0]) == 2
    # fp32 sums in another order, of a loss of some 6 nats: a few units in the last place.
    assert losses[1] == pytest.approx(losses[0], rel=2**-20)


def test_hf2jax_and_then_params(folder):
    """Weights of transformers are imported to a file's name, and a run begins with them."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=280,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained("llama")
    tokenizer = Path("fla-hub/transformer-1.3B-100B")
    for path in tokenizer.iterdir():
        (Path("llama") / path.name).write_bytes(path.read_bytes())
    words = ["--checkpoint_dir", "llama", "--output_file", "open_llama", "--model_size", "7b"]
    assert main(["import", *words, "--streaming"]) == 0
    values = {"mesh": "1,1,1,1", "size": "debug", "length": 64, "attention": "blockwise"}
    line = smaller(
        words_of(RING_ATTENTION, batch=2, **values),
        dtype="fp32",
        total_steps=1,
        save_milestone_freq=0,
        load_checkpoint="params::open_llama",
        optimizer__adamw_optimizer__lr_warmup_steps=0,
        optimizer__adamw_optimizer__lr_decay_steps=1,
        optimizer__adamw_optimizer__lr="1e-9",
        optimizer__adamw_optimizer__end_lr="1e-10",
        train_dataset__json_dataset__tokenizer_processes=1,
    )
    line.append("--logger.output_dir=out")
    sizes = "num_hidden_layers=1,vocab_size=280,hidden_size=32,intermediate_size=64"
    line = [word.replace("dict(", f"dict({sizes},") for word in line]
    assert main(["train", *line]) == 0
    saved = open_model(Path("out"), 1).model
    expected = model.model.embed_tokens.weight
    torch.testing.assert_close(saved.embed.weight, expected, rtol=0, atol=1e-7)
