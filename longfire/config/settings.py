"""Every setting of a run: one frozen dataclass a section, each owned by one room; free of torch so
that --help is instant.

A field is declared `setting(default, "help")`. Its type and interval are checked strictly
(config/recipe.py), its help is what `--help` prints, and its default is here and nowhere else.
Units stand in names. Old spellings live in `config/aliases/`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

NATURAL, POSITIVE, SHARE = "[0, inf)", "[1, inf)", "[0, 1]"  # intervals that many settings share


def setting(
    default: Any, help: str, within: str = "", bare: str = "", is_prose: bool = False
) -> Any:
    """A dataclass field with its help; the help is the only documentation of the setting.

    within: the interval of allowed numbers, as mathematics writes it: "[0, 1)". bare: what the flag
    without a value means (booleans: true). is_prose: text that may hold a URL; in every other text
    one is refused (config/paths.py).
    """
    return field(
        default=default,
        metadata={"help": help, "within": within, "bare": bare, "is_prose": is_prose},
    )


# The files of parallel/context_strategies
ContextStrategyName = Literal["ring", "allgather", "alltoall"]
# which parts of a block are recomputed in the backward
Remat = Literal["none", "block", "mlp", "attention", "attention+mlp"]


@dataclass(frozen=True)
class Job:
    """Where the run lives, and what it is called."""

    dump_folder: str = setting(
        "runs/longfire", "the run folder: settings, metrics, checkpoints, report"
    )
    description: str = setting(
        "", "free text, kept in run.toml and shown in the report", is_prose=True
    )
    print_args: bool = setting(False, "print every resolved setting at the start")


@dataclass(frozen=True)
class Model:
    """The model: its shape, weights to start from, compute type."""

    config: str = setting(
        "",
        "the model's config: a config.json of ours or of Hugging Face, or a folder that holds "
        "one, relative to the recipe, else to the working folder; or the name of one that comes "
        "with longfire, as gla-340m. Instead of it, or over it: the keys of the model in "
        "[model], as hidden_size",
    )
    backend: Literal["longfire", "transformers"] = setting(
        "longfire",
        "whose forward computes: ours, or transformers' own class of model.config's model_type "
        "(any of AutoModelForCausalLM, and those that a file of model.plugins registers), with "
        "whole logits and no plan inside it",
    )
    weights: str = setting(
        "",
        "start from these weights instead of a fresh initialisation: a folder of Hugging "
        "Face's, a run folder (its newest one), or a checkpoint, as runs/a/checkpoints/step-100",
    )
    rope_theta: float = setting(
        0.0,
        "base of rotary positions in all attention layers, when a model goes on at a longer "
        "context; max_position_embeddings grows to training.seq_len with it; 0: as in the config",
        NATURAL,
    )
    plugins: tuple[str, ...] = setting(
        (),
        "Python files of your own that are run first and may add mixers, MLPs and optimizers: "
        "tables MIXERS, MLPS and OPTIMIZERS = {name: class}",
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        "type of activations and matrix products; parameters and optimizer stay float32. auto: "
        "bfloat16 where the device multiplies it natively, else float32",
    )
    kernels: Literal["auto", "torch", "reference"] = setting(
        "auto",
        "auto: the fastest kernels installed; torch: our chunkwise forms; reference: the "
        "recurrent reference implementation",
    )


@dataclass(frozen=True)
class Data:
    """Texts, how they become token stores, shuffling, validation documents."""

    dataset: tuple[str, ...] = setting(
        ("embedded",),
        "sources, comma-separated: files, folders, globs (jsonl[.gz|.zst], json, parquet, "
        "arrow, txt), datasets of the hub, or `embedded` (Python's own library source). In a "
        "recipe also as [[data.sources]] tables with dataset, name, split, data_dir, "
        "data_files, text_field, record_format, share",
    )
    dataset_name: tuple[str, ...] = setting(
        (), "the hub dataset's configuration, one for each source (or one for all)"
    )
    dataset_split: tuple[str, ...] = setting(
        (), "the hub dataset's split, one for each source (or one for all); train if empty"
    )
    data_dir: tuple[str, ...] = setting((), "folder inside each source")
    data_files: tuple[str, ...] = setting((), "files or globs inside each source")
    data_probs: tuple[float, ...] = setting(
        (), "share of TOKENS of each source; equal if empty; any positive numbers"
    )
    text_field: tuple[str, ...] = setting(
        (),
        "field that holds the text, one for each source (or one for all); `text`, else "
        "`content`, if empty",
    )
    record_format: tuple[str, ...] = setting(
        (),
        "what the records of each source are, one for each source (or one for all): text; tokens "
        "(ids, with a loss mask if a record has one); fields (several, some of them without "
        "loss); chat (messages, with loss on the assistant's); if empty, fields where data.fields "
        "is set, else text",
    )
    ids_field: str = setting(
        "input_ids",
        "of tokens: the field with the ids. `loss_mask` (0 or 1 for each id) or `labels` (-100 "
        "where nothing is to be learned) beside it are read where a record has them",
    )
    document_end: str = setting(
        "",
        "of tokens: the token after which a document ends, as <|endoftext|>, where documents were "
        "joined and cut into rows; if empty, each row is a document",
        is_prose=True,
    )
    fields: str = setting(
        "",
        'of fields: the parts of a document, as "[instruction+input],output": + joins fields, '
        "no loss on what is in brackets, <|bos|> and <|eos|> are tokens",
    )
    fields_from_record: str = setting(
        "", "of fields: the field of each record that says its parts, instead of data.fields"
    )
    field_separator: str = setting(
        " ", "of fields: what stands between joined fields", is_prose=True
    )
    messages_field: str = setting(
        "messages", "of chat: the field with the messages, each with `role` and `content`"
    )
    split_documents: str = setting(
        "",
        "how a text file (.txt, .md ...) becomes documents: `lines`, `blank_lines` (what stands "
        "between them), or any other text that separates them, as <|endoftext|>; empty: the "
        "file is one document",
        is_prose=True,
    )
    validation: tuple[str, ...] = setting(
        (),
        "texts of one's own to evaluate on (files, folders, globs, datasets of the hub), in "
        "training and by `longfire eval`; all of data.dataset is then trained on",
    )
    validation_split: str = setting(
        "validation", "the split that is taken of a hub dataset in data.validation"
    )
    folder: str = setting("token-stores", "where token stores are kept; shared between runs")
    streaming: bool = setting(
        False, "start to train as soon as the first sequences exist, while the store still grows"
    )
    shuffle: Literal["auto", "global", "window", "none"] = setting(
        "auto",
        "global: a permutation of each epoch's sequences; window: inside windows of "
        "shuffle_window_rows; auto: window if streaming, else global",
    )
    shuffle_window_rows: int = setting(16384, "sequences in a shuffling window", POSITIVE)
    varlen: bool = setting(
        False, "confine attention and state to documents; false: documents are not separated"
    )
    context_len: int = setting(
        0, "with varlen: split longer documents after this many tokens; 0: no limit", NATURAL
    )
    validation_fraction: float = setting(
        0.005,
        "share of documents that are kept for validation, chosen by a hash of their identity, and "
        "at least one; of fewer than 8 documents the ends instead: this share of each, but at "
        "least 50,000 characters or a tenth of it",
        "[0, 1)",
    )
    num_workers: int = setting(0, "processes that tokenize; 0: one for each core", NATURAL)
    prefetch_factor: int = setting(2, "batches made ready ahead of training; 0: none", NATURAL)
    skip_bad_documents: bool = setting(
        False, "count and list documents that cannot be read instead of stopping"
    )
    trust_remote_code: bool = setting(
        False, "let a hub dataset run its own code (it can do anything; off unless asked)"
    )


@dataclass(frozen=True)
class Tokenizer:
    """Bytes, a tokenizer of your own, or one that is trained on the data."""

    path: str = setting(
        "bytes",
        "`bytes`, `train` (a byte-level BPE trained on the data), a tokenizer.json, a folder, "
        "or a hub id; where none is named, the tokenizer beside model.weights, else the one of "
        "distillation.teacher, with its add_bos and add_eos",
    )
    train_vocab_size: int = setting(
        4096, "vocabulary size of a trained tokenizer, special tokens included", "[258, inf)"
    )
    train_bytes: int = setting(8_000_000, "bytes of text that a tokenizer is trained on", POSITIVE)
    add_bos: bool = setting(False, "put the beginning-of-text token before each document")
    add_eos: bool = setting(True, "put the end-of-text token after each document")
    allow_mismatch: bool = setting(
        False,
        "start from model.weights, or learn from a teacher, whose tokenizer is another one: "
        "each id then stands for other text than the weights were trained on",
    )
    max_lost_share: float = setting(
        0.01,
        "stop when the tokenizer cannot say more than this share of the characters of a source "
        "(it has no token for them, or its unknown token); 1: never",
        SHARE,
    )


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
    threads: int = setting(0, "CPU threads; 0: torch's own choice", NATURAL)
    loss_chunk_tokens: int = setting(
        1024, "tokens whose logits exist at one time in the fused head and loss", POSITIVE
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
class Optimizer:
    """Learning rate, betas, weight decay."""

    name: str = setting(
        "AdamW", "AdamW, Adam (no weight decay), or one that a file of model.plugins brings"
    )
    lr: float = setting(3e-4, "peak learning rate", "(0, inf)")
    eps: float = setting(1e-8, "added to the denominator", "(0, inf)")
    beta1: float = setting(0.9, "decay of the mean of gradients", "[0, 1)")
    beta2: float = setting(0.95, "decay of the mean of squared gradients", "[0, 1)")
    weight_decay: float = setting(
        0.1, "decoupled weight decay; never on norms, biases, embeddings", NATURAL
    )
    embedding_lr_scale: float = setting(
        1.0,
        "learning rate of embedding and learned positions as a multiple of lr (of a tied head "
        "too); 0: they do not learn",
        NATURAL,
    )
    head_lr_scale: float = setting(1.0, "the same of a head of its own", NATURAL)
    matrix_lr_scale: float = setting(
        1.0, "the same of the weights of mixers and MLPs: matrices and short convolutions", NATURAL
    )
    other_lr_scale: float = setting(
        1.0, "the same of the rest: norms, biases, decay rates", NATURAL
    )
    fused: bool = setting(True, "torch's fused kernel")
    options: tuple[str, ...] = setting(
        (), "settings that the optimizer has for itself, as name=value (AdamW and Adam have none)"
    )


@dataclass(frozen=True)
class LRScheduler:
    """Warm-up and decay of the learning rate."""

    name: Literal["cosine", "linear", "wsd", "constant"] = setting("cosine", "shape after warm-up")
    warmup_steps: int = setting(
        200,
        "linear warm-up from 0, in steps; a fifth of the run where that is longer than the run, "
        "and with training.max_seconds at most a fifth of the planned steps",
        NATURAL,
    )
    warmup_tokens: int = setting(
        0, "the same in tokens; wins over warmup_steps when not 0", NATURAL
    )
    min_lr_ratio: float = setting(0.1, "floor as a share of the peak", SHARE)
    decay_end_step: int = setting(
        0,
        "step at which the decay has come down to the floor, where the rate then stays; 0: the "
        "last step of the run",
        NATURAL,
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = setting(
        "linear", "wsd: how the decay comes down to the floor; sqrt: by 1 - sqrt(x)"
    )
    decay_ratio: float = setting(0.1, "wsd: share of the whole run that the decay takes", SHARE)


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
    param_gather_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "type in which sharded parameters travel. bfloat16 halves that, and rounds norms and "
        "decay rates too",
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
class Attention:
    """How softmax attention is computed: fused, in chunks, or with all scores in memory."""

    kind: Literal["auto", "vanilla", "blockwise"] = setting(
        "auto",
        "how softmax attention is computed. auto: torch's fused kernels; vanilla: with all "
        "scores in memory; blockwise: chunks of queries by chunks of keys. The same numbers",
    )
    query_chunk_size: int = setting(
        1024, "blockwise: queries that are computed at a time, in tokens", POSITIVE
    )
    key_chunk_size: int = setting(
        1024, "blockwise: keys that they meet at a time, in tokens", POSITIVE
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


@dataclass(frozen=True)
class Checkpoint:
    """When to save, what to keep, the export at the end."""

    enable_checkpoint: bool = setting(True, "save checkpoints and resume from the newest whole one")
    folder: str = setting("checkpoints", "folder inside the run folder")
    interval_type: Literal["steps", "seconds"] = setting("steps", "unit of interval")
    interval: int = setting(500, "save every so many steps or seconds; 0: only at the end", NATURAL)
    milestone_interval: int = setting(
        0, "save at every so many steps too, and keep these checkpoints for ever; 0: none", NATURAL
    )
    keep_latest_k: int = setting(
        5,
        "keep the newest k besides milestones and step 0; 0: keep all. Checkpoints that were "
        "saved under 0, or by a longfire whose default that was, are never removed",
        NATURAL,
    )
    load_step: int = setting(
        -1,
        "go back to this step, once: a run that has gone on from there, and has saved since, "
        "resumes from its newest checkpoint, whatever this says. Not kept in run.toml. -1: the "
        "newest whole checkpoint",
        "[-1, inf)",
    )
    load_step_again: bool = setting(
        False,
        "go back to load_step although this run has gone back to it before, and has saved "
        "since. Not kept in run.toml",
    )
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = setting(
        "async", "write behind training; disabled: training waits until the checkpoint is on disk"
    )
    create_seed_checkpoint: bool = setting(
        False, "save step 0 and stop: the same start for several runs"
    )
    model_weights_only: bool = setting(
        False, "the last checkpoint holds the model's weights only (cannot be resumed)"
    )
    export: bool = setting(
        False, "at the end also write Hugging Face weights to <run>/hf, and check them"
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "type of exported weights"
    )


@dataclass(frozen=True)
class Distillation:
    """Learn from another model's outputs."""

    teacher: str = setting(
        "",
        "learn from this model: a folder of Hugging Face weights or a run folder; empty: from "
        "the text",
    )
    kind: Literal["hidden", "logits"] = setting(
        "logits",
        "hidden: each mixer that replaced one of the teacher's learns its output from its input "
        "(a first, short stage; only these mixers learn); logits: the model learns the "
        "teacher's probabilities of the next token",
    )
    temperature: float = setting(1.0, "logits: of both models' probabilities", "(0, inf)")
    ce_weight: float = setting(0.0, "logits: share of the loss that is of the text itself", SHARE)


@dataclass(frozen=True)
class Eval:
    """Validation loss during training and at its end, a sample."""

    interval: int = setting(
        0, "evaluate on validation documents every so many steps; 0: never during training", NATURAL
    )
    at_end: bool = setting(True, "evaluate after the last step")
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


@dataclass(frozen=True)
class Metrics:
    """Console, TensorBoard, Weights & Biases, the report."""

    log_freq: int = setting(10, "print every so many steps; metrics.jsonl has every step", POSITIVE)
    enable_tensorboard: bool = setting(False, "write TensorBoard events")
    save_tb_folder: str = setting("tensorboard", "folder inside the run folder")
    enable_wandb: bool = setting(False, "log to Weights & Biases (extra `wandb`)")
    wandb_project: str = setting("longfire", "project there")
    wandb_mode: Literal["online", "offline"] = setting(
        "online", "offline: only on disk, to be synced later"
    )
    disable_color_printing: bool = setting(False, "no colours, no live progress")
    report: bool = setting(True, "write report.html at the end")


@dataclass(frozen=True)
class Profiling:
    """Torch profiler traces and memory snapshots."""

    enable_profiling: bool = setting(False, "write torch profiler traces")
    save_traces_folder: str = setting("profile_traces", "folder inside the run folder")
    profile_freq: int = setting(10, "trace one step in so many", POSITIVE)
    enable_memory_snapshot: bool = setting(False, "write CUDA memory snapshots beside the traces")
    save_memory_snapshot_folder: str = setting("memory_snapshot", "folder inside the run folder")


@dataclass(frozen=True)
class Comm:
    """Timeouts of collectives, the flight recorder."""

    init_timeout_seconds: int = setting(
        3600,
        "stop with a stack trace if set-up and first step take longer; 0: wait for ever",
        NATURAL,
    )
    train_timeout_seconds: int = setting(
        3600, "the same for each later step, save and evaluation; 0: wait for ever", NATURAL
    )
    trace_buf_size: int = setting(
        20000,
        "collectives of each process that torch's flight recorder keeps, and writes when one "
        "hangs; 0: none",
        NATURAL,
    )


SECTIONS: dict[str, type] = {
    "job": Job,
    "model": Model,
    "data": Data,
    "tokenizer": Tokenizer,
    "training": Training,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "parallelism": Parallelism,
    "attention": Attention,
    "activation_checkpoint": ActivationCheckpoint,
    "checkpoint": Checkpoint,
    "distillation": Distillation,
    "eval": Eval,
    "metrics": Metrics,
    "profiling": Profiling,
    "comm": Comm,
}
