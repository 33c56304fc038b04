"""The models of the published sizes, at full and at small size, as runs on random tokens."""

from dataclasses import replace
from typing import TypedDict, Unpack

import torch

from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.gpu_check.stage import Work
from longfire.parallel.cost import Device, device_here
from longfire.planner.planner import Planner

MODELS = ("transformer-1b", "gla-1b", "gpt3-xl", "gated-deltanet-1b", "mamba2-1b")
# Keys of a small model of the same kind, over those of the config
SMALL = {
    "model.hidden_size": "64",
    "model.num_hidden_layers": "2",
    "model.vocab_size": "512",
}
SMALL_MLP = {"model.intermediate_size": "128"}
SMALL_OF = {
    "transformer-1b": SMALL_MLP | {"model.attention.num_heads": "4"},
    "transformer-7b": SMALL_MLP
    | {"model.attention.num_heads": "4", "model.attention.num_kv_heads": "2"},
    "transformer-340m": SMALL_MLP | {"model.attention.num_heads": "4"},
    "gla-1b": SMALL_MLP,
    "gpt3-xl": SMALL_MLP | {"model.attention.num_heads": "4"},
    "gated-deltanet-1b": SMALL_MLP
    | {"model.gated_delta_net.num_heads": "2", "model.gated_delta_net.head_dim": "16"},
    "mamba2-1b": {"model.mamba2.head_dim": "32", "model.mamba2.state_size": "16"},
}
SEQ_LEN = {True: 64, False: 2048}  # True: small
MOST_SEQUENCES = 16  # of a step: 32,768 tokens
ROOM = 0.85  # of what the planner calls usable: the planner is tried by this check, not trusted


class Sizes(TypedDict, total=False):
    """What of a run is not as it is by default."""

    layers: int  # 0: as in the config
    seq_len: int
    batch_size: int
    documents: bool
    remat: str  # activation_checkpoint.mode


def run_of(name: str, work: Work, **sizes: Unpack[Sizes]) -> Run:
    """A run of one of these models on random tokens, as `longfire bench` takes it."""
    overrides = {
        "model.config": name,
        "tokenizer.path": "bytes",  # tokens are random; nothing is read
        "job.dump_folder": str(work.folder / "run"),
        "training.seq_len": str(sizes.get("seq_len", SEQ_LEN[work.is_small])),
        "training.batch_size": str(sizes.get("batch_size", 2)),
        "training.steps": "100",
        "data.varlen": str(sizes.get("documents", False)).lower(),
        "activation_checkpoint.mode": sizes.get("remat", "none"),
    }
    if not work.is_cuda:
        overrides["training.compile"] = "off"
    if sizes.get("layers"):
        overrides["model.num_hidden_layers"] = str(sizes["layers"])
    if work.is_small:
        overrides |= SMALL | SMALL_OF[name]
    return Run.compose(None, overrides)


def config_of(run: Run) -> ModelConfig:
    """The model's config with its vocabulary; all models here are longfire's own."""
    config = run.known_model_config
    assert isinstance(config, ModelConfig)
    return config.with_vocabulary(run.vocab_size)


def planned_bytes(run: Run, device: Device) -> float:
    """What the planner says that a step holds at most."""
    planner = Planner(run, device)
    return planner.peak(planner.of_recipe()).total


def device_of_work(work: Work) -> Device:
    """This device, with its own memory, as the planner knows it."""
    if not work.is_cuda:
        return device_here("", 0)
    properties = torch.cuda.get_device_properties(work.device)
    return device_here(properties.name, properties.total_memory)


def fitting_run(name: str, work: Work, layers: int = 0) -> tuple[Run | None, float]:
    """The run with the most sequences, a power of two, that the planner lets fit here, and the
    bytes of its step; recomputed where not even one sequence fits otherwise. (None, the bytes of
    one sequence) where that does not fit either."""
    device = device_of_work(work)
    if not work.is_cuda:
        run = run_of(name, work, layers=layers)
        return run, planned_bytes(run, device)
    room = ROOM * device.usable_bytes
    for remat in ("none", "block"):
        run = run_of(name, work, layers=layers, remat=remat)
        planner = Planner(run, device)
        plan = planner.of_recipe()
        batch_size = MOST_SEQUENCES
        while batch_size:
            needed = planner.peak(replace(plan, batch_size=batch_size)).total
            if needed <= room:
                fitting = run_of(name, work, layers=layers, remat=remat, batch_size=batch_size)
                return fitting, needed
            batch_size //= 2
    return None, needed
