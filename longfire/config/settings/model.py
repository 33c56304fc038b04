"""The model, its attention, and a teacher that it learns from."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, POSITIVE, SHARE, setting


@dataclass(frozen=True)
class Model:
    """The model: its shape, weights to start from, compute type."""

    config: str = setting(
        "",
        "the model's config: a config.json of ours or of Hugging Face, or a folder that holds "
        "one, relative to the recipe, else to the working folder; or the name of one that comes "
        "with longfire, as gla-340m, or of a model of the hub, as OWNER/NAME. Instead of it, "
        "or over it: the keys of the model in [model], as hidden_size",
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
        "Face's, a run folder (its newest one), a checkpoint, as runs/a/checkpoints/step-100, or "
        "a model of the hub, as OWNER/NAME",
    )
    rope_theta: float = setting(
        0.0,
        "base of rotary positions in all attention layers, when a model continues at a longer "
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
class Distillation:
    """Learn from another model's outputs."""

    teacher: str = setting(
        "",
        "learn from this model: a folder of Hugging Face weights, a run folder, or a model of "
        "the hub; empty: from the text",
    )
    kind: Literal["hidden", "logits"] = setting(
        "logits",
        "hidden: each mixer that replaced one of the teacher's learns its output from its input "
        "(a first, short stage; only these mixers learn); logits: the model learns the "
        "teacher's probabilities of the next token",
    )
    temperature: float = setting(1.0, "logits: of both models' probabilities", "(0, inf)")
    ce_weight: float = setting(0.0, "logits: share of the loss that is of the text itself", SHARE)
