"""A model -> a folder of Hugging Face weights, written aside, loaded again and compared before it
appears under its name."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longfire.checkpoint.checkpoint import refuse_another_vocabulary
from longfire.checkpoint.weights import open_model, run_of, tokenizer_of, weights_on_disk
from longfire.config.run import Run, export_line
from longfire.data.tokenizer import Tokenizer
from longfire.disk import put_in_place, sync
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.check import (
    Check,
    compare,
    compare_bytes,
    compare_tokenizer,
    refuse_unless,
)
from longfire.huggingface.checksums import write_checksums
from longfire.huggingface.families import config_to_hf, family_named
from longfire.huggingface.family import Family
from longfire.huggingface.family_writing import left_out
from longfire.huggingface.load import INDEX, SINGLE, load_weights
from longfire.huggingface.model_card import model_card, without_folders
from longfire.huggingface.tensors import Stored, layout
from longfire.huggingface.transformers_model import TransformersModel, compare_saved, save
from longfire.model import Model, on_meta
from longfire.training.reporting import METRICS, records

__all__ = ["Check", "export", "export_run", "load_weights"]

SHARD_BYTES = 5_000_000_000  # as the hub's own tools cut


def export(
    model: Model | TransformersModel,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    facts: dict[str, Any] | None = None,
    files: Mapping[str, str] = {},
    shard_bytes: int = SHARD_BYTES,
    on_disk: Mapping[str, Tensor] | None = None,
    adds_bos: bool | None = None,
) -> Check:
    """Write the model to `folder` as transformers or fla loads it, else as our own class of
    transformers does; what was compared is returned and stands in the model card.

    facts: what the card says of how the weights came to be; `seq_len` among them becomes
    max_position_embeddings where the shape sets no limit. files: name -> text of what else lies in
    the folder. on_disk: the parameters of a model that is on meta, read when asked for; then a
    shard is all that is in memory, and bytes are all that is compared. An earlier export in the
    folder is replaced, by a whole one only. adds_bos: whether documents began with BOS in training,
    which the exported tokenizer then puts before every text; None: as it does now. Raises
    CheckpointError when something does not compare or the disk is full.
    """
    folder, facts = Path(folder), facts or {}
    refuse_to_replace(folder)
    length, type_name = int(facts.get("seq_len", 2048)), str(dtype).removeprefix("torch.")
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = config_of(model, ends, length, type_name)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        if isinstance(model, TransformersModel):
            save(model, aside, dtype, ends, shard_bytes)
        else:
            weights = model.state_dict() if on_disk is None else on_disk
            family = family_named(config["model_type"])
            written = write_weights(model, weights, family, aside, dtype, shard_bytes)
            write_json(aside / "config.json", config)
            facts = {**facts, "not in config.json": ", ".join(left_out(family, model.config))}
        tokenizer.save(aside, adds_bos)
        if isinstance(model, TransformersModel):
            compare_tokenizer(tokenizer, aside)
            check = compare_saved(model, aside, dtype)
        elif on_disk is not None:
            check = compare_bytes(on_disk, tokenizer, aside, written, model.config)
        else:
            check = compare(model, tokenizer, aside, written)
        parameters = sum(p.numel() for p in model.parameters())
        card = model_card(folder.absolute().name, config, parameters, facts, check)
        for name, text in {"README.md": card, **files}.items():
            (aside / name).write_text(text, encoding="utf-8")
        write_checksums(aside)
        settle(aside)
        put_in_place(aside, folder)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{folder}: the export could not be written ({e}); nothing that was there has changed"
        ) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return check


def config_of(
    model: Model | TransformersModel, ends: dict[str, int | None], length: int, dtype: str
) -> dict[str, Any]:
    """config.json of an export."""
    if isinstance(model, TransformersModel):
        return {**model.theirs.config.to_dict(), "architectures": [type(model.theirs).__name__]}
    return config_to_hf(
        model.config,
        bos_id=ends["bos_token_id"],
        eos_id=ends["eos_token_id"],
        length=length,
        dtype=dtype,
    )


def export_run(
    run_folder: Path,
    step: int,
    out: Path,
    dtype: str = "",
    plugins: tuple[str, ...] = (),
    logits: bool = True,
    note: Callable[[str], None] = print,
) -> Check:
    """Export a run's checkpoint of this step (-1: the newest whole one), also while the run is
    training.

    dtype: float32, bfloat16 or float16; "" takes checkpoint.export_dtype. logits: whether to
    compare them too, for which the model must fit into memory. Raises as `export` and `open_model`
    do.
    """
    if not logits:
        return export_bytes(run_folder, step, out, dtype, plugins, note)
    opened = open_model(Path(run_folder), step, plugins=plugins)
    if opened.run is None:
        raise SettingsError(f"{run_folder} is no run folder: it holds Hugging Face weights already")
    note(f"export: {export_line(opened.model.config)}")
    chosen = getattr(torch, dtype or opened.run.checkpoint.export_dtype)
    facts, adds_bos = facts_of(opened.run, opened.step), opened.run.tokenizer.add_bos
    return export(opened.model, opened.tokenizer, out, dtype=chosen, facts=facts, adds_bos=adds_bos)


def export_bytes(
    run_folder: Path,
    step: int,
    out: Path,
    dtype: str,
    plugins: tuple[str, ...],
    note: Callable[[str], None],
) -> Check:
    """The same of a model that no machine holds: tensor by tensor from the checkpoint."""
    run = run_of(Path(run_folder), plugins)
    if run.model.backend == "transformers":
        raise SettingsError(
            "a model of transformers (model.backend) is exported by its own class, which holds it: leave --compare out"
        )
    tokenizer = tokenizer_of(run)
    step, weights = weights_on_disk(run.folder / run.checkpoint.folder, step)
    place = run.folder / run.checkpoint.folder / f"step-{step}"
    refuse_another_vocabulary(place, tokenizer.vocabulary, tokenizer.where)
    model = on_meta(run.model_config_after(step).with_vocabulary(tokenizer.vocab_size))
    note(f"export: {export_line(model.config)}")
    chosen = getattr(torch, dtype or run.checkpoint.export_dtype)
    facts, adds_bos = facts_of(run, step), run.tokenizer.add_bos
    return export(
        model, tokenizer, out, dtype=chosen, facts=facts, on_disk=weights, adds_bos=adds_bos
    )


def facts_of(run: Run, step: int) -> dict[str, Any]:
    """What the model card says of a run's checkpoint: settings, and the numbers that were recorded
    at its step."""
    metrics, recorded = run.folder / METRICS, {}
    for record in records(metrics) if metrics.exists() else ():
        if record and record["step"] == step:
            recorded |= record
    shown = {key: recorded[key] for key in ("tokens", "loss") if key in recorded}
    shown |= {
        f"validation {key.removeprefix('eval/')}": value
        for key, value in recorded.items()
        if key.startswith("eval/")
    }
    return {
        "description": run.job.description,
        "data": ", ".join(without_folders(name) for name in run.data.dataset) if step else "",
        "steps": step,
        "tokens_per_step": run.tokens_per_step,
        "seq_len": run.training.seq_len,
        "optimizer": f"{run.optimizer.name}, lr {run.optimizer.lr:g}, {run.lr_scheduler.name}",
        **{
            key: f"{value:.4f}" if isinstance(value, float) else value
            for key, value in shown.items()
        },
    }


def refuse_to_replace(folder: Path) -> None:
    """Raises SettingsError when the folder holds anything but an earlier export."""
    card = folder / "README.md"
    if (
        folder.is_dir()
        and card.is_file()
        and "longfire" in card.read_text(encoding="utf-8", errors="replace")
    ):
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SettingsError(
            f"{folder}: already there, and no export of longfire; name a new folder, or remove it"
        )


def write_weights(
    model: Model,
    weights: Mapping[str, Tensor],
    family: Family,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> dict[str, torch.dtype]:
    """Write the parameters in shards, one in memory at a time; returns each parameter's type in the
    files."""
    types = types_of(model, dtype)
    wanted = layout(family, model.config)
    # what is laid end to end has one type: the exact one, if a part needs it
    kinds = {
        theirs: max((types[n] for n in s.ours), key=lambda t: t.itemsize)
        for theirs, s in wanted.items()
    }
    sizes = {theirs: math.prod(s.shape) * kinds[theirs].itemsize for theirs, s in wanted.items()}
    shards = list(cut(sizes, shard_bytes))
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {theirs: rounded(wanted[theirs], weights, kinds[theirs]) for theirs in names}
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        )
    return {name: kinds[theirs] for theirs, s in wanted.items() for name in s.ours}


def rounded(stored: Stored, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Their tensor of ours, in `dtype`. Raises CheckpointError naming a parameter that the type
    cannot hold."""
    weights = {name: weights[name] for name in stored.ours}
    for name in stored.ours:
        fits = weights[name].to(dtype).isfinite().all() or not weights[name].isfinite().all()
        refuse_unless(
            bool(fits),
            f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold; export as bfloat16 or float32",
        )
    return stored.join(weights).detach().to("cpu", dtype).contiguous()


def types_of(model: Model, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameter -> its type in the files: `dtype`, fp32 for what no type may round."""
    exact = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf in getattr(module, "keep_fp32", ())
    }
    return {name: torch.float32 if name in exact else dtype for name in model.state_dict()}


def cut(sizes: dict[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where a shard would grow over `shard_bytes`; a larger tensor has a shard
    of its own."""
    shard: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def settle(folder: Path) -> None:
    """Everything on disk, and readable by all who can read the config."""
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copymode(
                folder / "config.json", path
            )  # safetensors makes files that only their owner can read
        sync(path)
