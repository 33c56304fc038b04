"""Batches, steps, what is recomputed in the backward, evaluation."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, POSITIVE, WORKERS, Remat, setting


@dataclass(frozen=True)
class Training:
    """Sequence length, batch size, steps, device, compilation."""

    seq_len: int = setting(
        2048, "tokens of a sequence; with seq_len_schedule of the longest", POSITIVE
    )
    seq_len_schedule: tuple[str, ...] = setting(
        (),
        "sequences that grow longer: STEP:LENGTH or STEP:LENGTH:ROPE_THETA, comma-separated, as "
        "0:2048,1000:8192,2000:32768:500000; each length divides seq_len, the longest, and a "
        "step of shorter sequences has as many more (batch_size counts those of seq_len)",
    )
    batch_size: int = setting(
        8, "micro-batch size: sequences of one micro-batch on one process", POSITIVE
    )
    global_batch_size: int = setting(
        0,
        "sequences of one step over all processes and micro-batches; 0: batch_size x "
        "gradient_accumulation_steps x processes",
        NATURAL,
    )
    gradient_accumulation_steps: int = setting(
        0, "micro-batches of one step; 0: from global_batch_size, or 1", NATURAL
    )
    steps: int = setting(10000, "optimizer steps of the whole run", POSITIVE)
    tokens: int = setting(
        0,
        "tokens of the whole run instead of steps; rounded up to whole steps; 0: use steps",
        NATURAL,
    )
    max_seconds: float = setting(
        0.0,
        "end the run after so many seconds of training, with the decay of the learning rate: "
        "the number of steps is planned from a few measured steps, and anew when the machine "
        "slows or quickens; steps (or tokens) remain the upper bound. Steps count, and the "
        "evaluations and saves between them, also before a resume; preparing data and model, "
        "the last save and evaluation, and export do not. 0: no limit",
        NATURAL,
    )
    step_plan: tuple[str, ...] = setting(
        (),
        "STEP:TOTAL_STEPS, comma-separated: how many steps a run with max_seconds was planned "
        "to have, from each step on. Such a run writes it into its run.toml; with max_seconds = "
        "0 the plan is followed without a clock: the same steps and learning rates",
    )
    max_norm: float = setting(
        1.0, "clip the norm of all gradients to this; 0: do not clip", NATURAL
    )
    skip_nan_inf: bool = setting(False, "skip a step whose gradients are not finite, and count it")
    max_skips_in_a_row: int = setting(
        10, "stop, naming the batch, after so many skipped steps in a row", POSITIVE
    )
    seed: int = setting(
        42, "seed of initialisation, data order and sampling", "[0, 18446744073709551615]"
    )
    deterministic: bool = setting(False, "refuse kernels whose result may differ from run to run")
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "torch.compile of each block; the bare flag means on. auto: on CUDA, and on a CPU with "
        "a C++ compiler when the run is long enough to pay for it",
        bare="on",
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where to train; auto: CUDA if there is one"
    )
    threads: int = setting(0, "CPU threads; 0: torch's own choice", WORKERS)
    keep_rounded_weights: Literal["auto", "on", "off"] = setting(
        "auto",
        "round the weights of matrices to the compute type once a step, instead of in each forward "
        "and backward: the same results, for 2 bytes a number from the first forward of a step to "
        "its last backward. (Compiled code of a CPU without bf16 units does not round weights "
        "without it.) Not where parameters are gathered from several processes or from the "
        "host. auto: on CUDA with several micro-batches a step",
    )
    loss_chunk_tokens: int = setting(
        0,
        "tokens whose logits exist at one time in the fused head and loss; 0: 1,024 on a CPU, "
        "4,096 on CUDA",
        NATURAL,
    )
    mlp_chunk_size: int = setting(
        0,
        "compute MLPs for so many tokens of a sequence at a time, each chunk again in the "
        "backward: their wide activations exist for one chunk only; 0: the whole sequence at once",
        NATURAL,
    )
    tbptt_segments: int = setting(
        1,
        "segments that a sequence is computed in, the state carried from each to the next; "
        "1: the whole sequence",
        POSITIVE,
    )
    tbptt_exact: bool = setting(
        False,
        "with tbptt_segments: gradients pass from segment to segment, which takes one more "
        "forward; false: they end where a segment begins (truncated backpropagation through "
        "time)",
    )
    gc_freq: int = setting(
        50, "collect garbage every so many steps, never in between; 0: leave it to Python", NATURAL
    )


@dataclass(frozen=True)
class ActivationCheckpoint:
    """What is recomputed in the backward pass to save memory."""

    mode: Remat = setting(  # noqa: RUF009 (setting makes a field)
        "none",
        "what is recomputed in the backward instead of kept: nothing, whole blocks, MLPs, "
        "mixers, or both of these",
    )
    policy: tuple[str, ...] = setting(
        ("nothing",),
        "what a part that is recomputed keeps nevertheless: nothing, matmuls (the outputs of "
        "matrix products and of attention kernels), or those of operations by torch's names, as "
        "mm,longfire.attend_blocks",
    )
    offload: bool = setting(
        False,
        "keep in the host's memory, instead of the device's, what blocks keep from forward to "
        "backward",
    )
    layer_interval: int = setting(
        1,
        "recompute in every so many-th block only, counted from 1: 2 is every second block",
        POSITIVE,
    )
    layers: tuple[int, ...] = setting(
        (), "recompute in these blocks only, by their numbers from 0; empty: see layer_interval"
    )


@dataclass(frozen=True)
class Eval:
    """Validation loss during training and at its end, a sample."""

    interval: int = setting(
        0, "evaluate on validation documents every so many steps; 0: never during training", NATURAL
    )
    at_end: bool = setting(True, "evaluate after the last step")
    ema: bool = setting(
        True,
        "with optimizer.ema_decay: evaluate the average of the weights, and let sample, export and "
        "whoever reads the run's checkpoints take it; false: the weights themselves",
    )
    tokens: int = setting(
        262144, "validation tokens of each source that an evaluation reads, at most", POSITIVE
    )
    compare_xz: bool = setting(
        False, "at the end show what `xz -9e` reaches on the same validation bytes"
    )
    sample_prompt: str = setting(
        "", "at the end generate a sample that continues this text", is_prose=True
    )
    sample_tokens: int = setting(128, "tokens of that sample", POSITIVE)
