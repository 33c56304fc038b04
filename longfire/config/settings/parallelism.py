"""Devices that share a run, and how long they wait for each other."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import (
    NATURAL,
    POSITIVE,
    SECONDS_TO_WAIT,
    ContextStrategyName,
    setting,
)


@dataclass(frozen=True)
class Parallelism:
    """One run on several devices: shards, tensor, context and pipeline parallelism."""

    mesh_dim: str = setting(
        "",
        "four degrees in one word, replicas,shards,tensor,context (one may be -1), instead of "
        "the five below",
    )
    data_parallel_replicate_degree: int = setting(
        1, "replicas of the model, each with sequences of its own", "[-1, inf)"
    )
    data_parallel_shard_degree: int = setting(
        -1,
        "processes that share parameters and optimizer, each with its own sequences; -1: those "
        "that remain",
        "[-1, inf)",
    )
    tensor_parallel_degree: int = setting(1, "processes that share each matrix", POSITIVE)
    pipeline_parallel_degree: int = setting(1, "processes that share the layers", POSITIVE)
    context_parallel_degree: int = setting(1, "processes that share each sequence", POSITIVE)
    context_parallel_strategy: Literal["auto", ContextStrategyName] = setting(
        "auto",
        "how softmax attention looks over them. ring: keys and values pass from one to the next "
        "while others are worked on; allgather: all keys and values come to all; alltoall: each "
        "has all tokens of some heads; auto: the fastest that fits, as `longfire plan` predicts "
        "it",
    )
    context_parallel_layout: Literal["auto", "contiguous", "zigzag", "balanced"] = setting(
        "auto",
        "which tokens each process has. contiguous: one piece each; zigzag: an early and a late "
        "piece, so that causal work is even; balanced: pieces dealt by the work that documents "
        "make; auto: zigzag, with data.varlen balanced; contiguous without softmax",
    )
    reshard_after_forward: Literal["auto", "always", "never"] = setting(
        "auto",
        "free gathered parameters after a block's forward, and gather them again in its "
        "backward; auto: unless pipeline parallel",
    )
    param_gather_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "type in which sharded parameters travel. auto: matrices that are multiplied in bfloat16 "
        "in that, all else in float32, which changes no number; bfloat16: all, which rounds norms, "
        "decay rates and gradients too",
    )
    cpu_offload: bool = setting(
        False, "keep shards of parameters, gradients and optimizer in the host's memory"
    )
    sequence_parallel: bool = setting(
        True,
        "with tensor parallel: each process holds its part of the tokens between mixers and MLPs",
    )
    pipeline_parallel_schedule: str = setting(
        "1F1B",
        "order of forwards and backwards: a name of torch.distributed.pipelining, as "
        "Interleaved1F1B",
    )
    pipeline_parallel_schedule_csv: str = setting("", "a file with the order, instead of its name")
    pipeline_parallel_split_points: tuple[str, ...] = setting(
        (), "modules that begin a stage, as layers.2,layers.4; empty: stages of equal cost"
    )
    pipeline_parallel_microbatches: int = setting(
        0,
        "micro-batches of a step in the pipeline; 0: those of gradient accumulation, or one a "
        "stage",
        NATURAL,
    )


@dataclass(frozen=True)
class Comm:
    """Timeouts of collectives, the flight recorder."""

    init_timeout_seconds: int = setting(
        3600,
        "stop with a stack trace if set-up and first step take longer; 0: wait for ever",
        SECONDS_TO_WAIT,
    )
    train_timeout_seconds: int = setting(
        3600, "the same for each later step, save and evaluation; 0: wait for ever", SECONDS_TO_WAIT
    )
    trace_buf_size: int = setting(
        20000,
        "collectives of each process that torch's flight recorder keeps, and writes when one "
        "hangs; 0: none",
        NATURAL,
    )
