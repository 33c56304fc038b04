"""A model -> a folder of Hugging Face weights. It is written under a temporary name, loaded again
and compared before it gets its own name."""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longfire.aside import folder_aside
from longfire.checkpoint.restoring import refuse_another_vocabulary
from longfire.checkpoint.weights import open_model, run_of, tokenizer_of, weights_on_disk
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.summary import export_line
from longfire.data.tokenizer import Tokenizer
from longfire.disk import put_in_place, sync
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.check import Check, compare, compare_bytes, name_of
from longfire.huggingface.check_tokenizer import compare_tokenizer
from longfire.huggingface.checksums import write_checksums
from longfire.huggingface.comparing import check
from longfire.huggingface.families import config_to_hf, family_named
from longfire.huggingface.family import Config, Family
from longfire.huggingface.family_writing import left_out
from longfire.huggingface.load import load_weights
from longfire.huggingface.model_card import model_card, without_folders
from longfire.huggingface.tensors import Stored, layout
from longfire.huggingface.transformers_files import compare_saved, save
from longfire.huggingface.transformers_model import TransformersModel
from longfire.huggingface.weight_files import INDEX, SINGLE
from longfire.listing import names_in, walk
from longfire.model import Model, on_meta
from longfire.regular_files import read_regular
from longfire.training.records import METRICS, records
from longfire.work_progress import WorkProgress

logger = logging.getLogger(__name__)

__all__ = ["Check", "export", "export_run", "load_weights"]

SHARD_BYTES = 5_000_000_000  # as the hub's own tools cut


def export(
    model: Model | TransformersModel,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    facts: Mapping[str, object] | None = None,
    files: Mapping[str, str] = {},
    shard_bytes: int = SHARD_BYTES,
    on_disk: Mapping[str, Tensor] | None = None,
    adds_bos: bool | None = None,
) -> Check:
    """Write the model to `folder` as transformers or fla loads it, else as our own class of
    transformers does. Returns what was compared, which is in the model card too.

    facts: how the weights were made, for the card; `seq_len` among them becomes
    max_position_embeddings where the model sets no limit. files: name -> text of other files for
    the folder. on_disk: the parameters of a model on the meta device, read one by one; then only a
    shard is in memory, and only bytes are compared. adds_bos: whether documents began with BOS in
    training, which the exported tokenizer then puts before every text; None: as it does now.

    An earlier export in the folder is replaced, and only when the new one is complete. Raises
    SettingsError when the folder holds anything else, CheckpointError when a comparison fails or
    the disk is full.
    """
    folder = Path(folder)
    facts = facts or {}
    check_replaceable(folder)
    try:
        with folder_aside(folder) as tmp_path:
            if isinstance(model, TransformersModel):
                config = config_of_transformers(model)
                compared = write_transformers(
                    model, tokenizer, tmp_path, dtype, shard_bytes, adds_bos
                )
            else:
                config = config_to_hf(
                    model.config,
                    bos_id=tokenizer.bos_id,
                    eos_id=tokenizer.eos_id,
                    length=length_of(facts),
                    dtype=name_of(dtype),
                )
                family = family_named(config["model_type"])
                weights = model.state_dict() if on_disk is None else on_disk
                written = write_weights(model, weights, family, tmp_path, dtype, shard_bytes)
                write_json(tmp_path / "config.json", config)
                facts = {**facts, "not in config.json": ", ".join(left_out(family, model.config))}
                tokenizer.save(tmp_path, adds_bos)
                if on_disk is None:
                    compared = compare(model, tokenizer, tmp_path, written)
                else:
                    compared = compare_bytes(on_disk, tokenizer, tmp_path, written, model.config)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            card = model_card(folder.absolute().name, config, parameters, facts, compared)
            for name, text in {"README.md": card, **files}.items():
                (tmp_path / name).write_text(text, encoding="utf-8")
            write_checksums(tmp_path)
            sync_files(tmp_path)
            put_in_place(tmp_path, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the export could not be written ({error}); nothing that was there has "
            "changed"
        ) from error
    return compared


def write_transformers(
    model: TransformersModel,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    adds_bos: bool | None,
) -> Check:
    """Write a model of transformers by its own class, and compare what is read back."""
    ends = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    save(model, folder, dtype, ends, shard_bytes)
    tokenizer.save(folder, adds_bos)
    compare_tokenizer(tokenizer, folder)
    return compare_saved(model, folder, dtype)


def length_of(facts: Mapping[str, object]) -> int:
    """Tokens of a sequence in training; 2048 where it is not known."""
    length = facts.get("seq_len", 2048)
    assert isinstance(length, int), "a number of tokens"
    return length


def config_of_transformers(model: TransformersModel) -> Config:
    """config.json of a model of transformers, for the card."""
    return {**model.theirs.config.to_dict(), "architectures": [type(model.theirs).__name__]}


def export_run(
    run_folder: Path,
    step: int,
    out: Path,
    dtype: str = "",
    plugins: tuple[str, ...] = (),
    logits: bool = True,
) -> Check:
    """Export a run's checkpoint of this step (-1: the newest complete one), also while the run is
    training.

    dtype: float32, bfloat16 or float16; "" takes checkpoint.export_dtype. logits: whether to
    compare them too, for which the model must fit into memory. Raises as `export` and `open_model`
    do.
    """
    if not logits:
        return export_bytes(run_folder, step, out, dtype, plugins)
    opened = open_model(Path(run_folder), step, plugins=plugins)
    if opened.run is None:
        raise SettingsError(f"{run_folder} is no run folder: it holds Hugging Face weights already")
    logger.info(f"export: {export_line(opened.model.config)}")
    return export(
        opened.model,
        opened.tokenizer,
        out,
        dtype=getattr(torch, dtype or opened.run.checkpoint.export_dtype),
        facts=facts_of(opened.run, opened.step),
        adds_bos=opened.run.tokenizer.add_bos,
    )


def export_bytes(
    run_folder: Path, step: int, out: Path, dtype: str, plugins: tuple[str, ...]
) -> Check:
    """The same for a model that does not fit into memory: tensor by tensor from the checkpoint."""
    run = run_of(Path(run_folder), plugins)
    if run.model.backend == "transformers":
        raise SettingsError(
            "a model of transformers (model.backend) is exported by its own class, which needs it "
            "in memory: leave --compare out"
        )
    tokenizer = tokenizer_of(run)
    step, weights = weights_on_disk(run.folder / run.checkpoint.folder, step)
    place = run.folder / run.checkpoint.folder / f"step-{step}"
    refuse_another_vocabulary(place, tokenizer.vocabulary, tokenizer.where)
    model_config = run.model_config_after(step)
    assert isinstance(model_config, ModelConfig), "model.backend is longfire"
    model = on_meta(model_config.with_vocabulary(tokenizer.vocab_size))
    logger.info(f"export: {export_line(model.config)}")
    return export(
        model,
        tokenizer,
        out,
        dtype=getattr(torch, dtype or run.checkpoint.export_dtype),
        facts=facts_of(run, step),
        on_disk=weights,
        adds_bos=run.tokenizer.add_bos,
    )


def facts_of(run: Run, step: int) -> dict[str, object]:
    """What the model card says of a run's checkpoint: settings, and the numbers that were recorded
    at its step."""
    names = [without_folders(name) for name in run.data.dataset]
    facts: dict[str, object] = {
        "description": run.job.description,
        "data": ", ".join(names) if step else "",
        "steps": step,
        "tokens_per_step": run.tokens_per_step,
        "seq_len": run.training.seq_len,
        "optimizer": f"{run.optimizer.name}, lr {run.optimizer.lr:g}, {run.lr_scheduler.name}",
    }
    for key, value in recorded_numbers(run, step).items():
        facts[key] = f"{value:.4f}" if isinstance(value, float) else value
    return facts


def recorded_numbers(run: Run, step: int) -> dict[str, object]:
    """The tokens, the loss and the evaluations that were recorded at a step."""
    metrics = run.folder / METRICS
    recorded: dict[str, object] = {}
    for record in records(metrics) if metrics.exists() else ():
        if record and record["step"] == step:
            recorded |= record
    numbers: dict[str, object] = {}
    for key in ("tokens", "loss"):
        if key in recorded:
            numbers[key] = recorded[key]
    for key, value in recorded.items():
        if key.startswith("eval/"):
            numbers[f"validation {key.removeprefix('eval/')}"] = value
    return numbers


def check_replaceable(folder: Path) -> None:
    """Raises SettingsError when the folder holds anything but an earlier export."""
    if not folder.exists() or is_export(folder):
        return
    if not folder.is_dir() or names_in(folder):
        raise SettingsError(
            f"{folder}: already there, and no export of longfire; name a new folder, or remove it"
        )


def is_export(folder: Path) -> bool:
    """Whether a folder has a model card of longfire."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    return b"longfire" in read_regular(card)


def write_weights(
    model: Model,
    weights: Mapping[str, Tensor],
    family: Family,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> dict[str, torch.dtype]:
    """Write the parameters in shards, one in memory at a time. Returns each parameter's type in the
    files."""
    wanted = layout(family, model.config)
    types = types_of(model, wanted.values(), dtype)
    sizes = {}
    for theirs, stored in wanted.items():
        sizes[theirs] = math.prod(stored.shape) * types[theirs].itemsize
    shards = list(cut(sizes, shard_bytes))
    files: dict[str, str] = {}
    total = sum(math.prod(stored.shape) for stored in wanted.values())
    with WorkProgress("export", total, "parameters") as progress:
        for number, names in enumerate(shards, 1):
            file = SINGLE
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for theirs in names:
                tensors[theirs] = rounded(wanted[theirs], weights, types[theirs])
                progress.add(tensors[theirs].numel())
            save_file(tensors, folder / file, {"format": "pt"})
            files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(folder / INDEX, index)
    written = {}
    for theirs, stored in wanted.items():
        for ours in stored.ours:
            written[ours] = types[theirs]
    return written


def rounded(
    stored: Stored,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Their tensor of ours, in `dtype`. Raises CheckpointError naming a parameter that the type
    cannot hold."""
    ours = {name: weights[name] for name in stored.ours}
    for name, tensor in ours.items():
        fits = tensor.to(dtype).isfinite().all() or not tensor.isfinite().all()
        check(
            bool(fits),
            f"{name} has values that {name_of(dtype)} cannot hold; export as bfloat16 or float32",
        )
    return stored.join(ours).detach().to("cpu", dtype).contiguous()


def types_of(
    model: Model,
    tensors: Iterable[Stored],
    dtype: torch.dtype,
) -> dict[str, torch.dtype]:
    """Their name -> the type in the files: `dtype`, or fp32 where a part must not be rounded."""
    exact = set()
    for name, module in model.named_modules():
        for leaf in getattr(module, "keep_fp32", ()):
            exact.add(f"{name}.{leaf}")
    types = {}
    for stored in tensors:
        types[stored.theirs] = dtype if exact.isdisjoint(stored.ours) else torch.float32
    return types


def cut(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where a shard would grow over `shard_bytes`; a larger tensor has a shard
    of its own."""
    shard: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if shard and filled + size > shard_bytes:
            yield shard
            shard = []
            filled = 0
        shard.append(name)
        filled += size
    yield shard


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sync_files(folder: Path) -> None:
    """Wait until everything is on disk, readable by all who can read the config."""
    for parent, _, names in walk(folder):
        for name in names:
            # safetensors makes files that only their owner can read
            shutil.copymode(folder / "config.json", Path(parent, name))
            sync(Path(parent, name))
        if Path(parent) != folder:
            sync(Path(parent))
