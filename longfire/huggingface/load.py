"""A folder of Hugging Face weights -> a model, one tensor at a time. weight_files.py reads the
files."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig
from longfire.config.strict import placed
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.families import config_from_hf, family_of
from longfire.huggingface.family import Family
from longfire.huggingface.tensors import Stored, layout, theirs_of
from longfire.huggingface.weight_files import NAMES_SHOWN, StoredTensor, WeightFiles
from longfire.model import Model

# Ends of names in old files of every family, beside its own `buffers`.
COMPUTED = ("rotary_emb.inv_freq",)


def load_model(
    folder: Path | str,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a folder of Hugging Face weights. Raises SettingsError,
    CheckpointError, DataError."""
    folder = Path(folder)
    model_config = model_config_in(folder)
    weights = load_weights(folder, model_config)
    model = model_of(model_config, weights, device, compute_dtype)
    return model, from_folder(folder)


def model_config_in(folder: Path) -> ModelConfig:
    """The model config that a folder's config.json describes, with a vocabulary. Raises
    SettingsError."""
    where = str(folder / "config.json")
    with placed(where):
        model_config = config_from_hf(read_config(folder), where)
    if not model_config.vocab_size:
        raise SettingsError(
            f"{where}: vocab_size = 0, but the weights have an embedding: write its number of rows"
        )
    return model_config


def model_of(
    model_config: ModelConfig,
    weights: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Model:
    """A model whose parameters are these very tensors (no second copy where they are on the device
    already)."""
    with torch.device("meta"):
        model = Model(model_config, compute_dtype)
    state = {name: tensor.to(device) for name, tensor in weights.items()}
    if model_config.tie_word_embeddings:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if model_config.tie_word_embeddings:
        model.head.weight = model.embed.weight  # assigning gave each a parameter of its own
    return model


def load_weights(folder: Path | str, model_config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of `Model(model_config)` from a folder's files, fp32. Raises CheckpointError
    as `read_weights` does."""
    weights = dict(read_weights(folder, model_config))
    if model_config.tie_word_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return weights


def read_weights(folder: Path | str, model_config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, fp32 tensor) of each parameter of `Model(model_config)`, without a tied head; one
    of their tensors in memory at a time.

    Names and shapes are compared before the first tensor is read. Raises CheckpointError naming
    missing, extra and wrongly shaped tensors, or the file that cannot be read.
    """
    folder = Path(folder)
    if model_config.image_size:
        from longfire.huggingface.vit import read_vit_weights

        yield from read_vit_weights(folder, model_config)
        return
    family = family_of(read_config(folder), str(folder / "config.json"))
    wanted = layout(family, model_config)
    files = WeightFiles(folder)
    names = matched(wanted, files, family, model_config)
    for theirs, stored in wanted.items():
        for ours, part in stored.split(files.read(names[theirs])):
            # a copy, and not a view of the file
            yield ours, part.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def matched(
    wanted: Mapping[str, Stored],
    files: WeightFiles,
    family: Family,
    model_config: ModelConfig,
) -> dict[str, str]:
    """Their name -> its name in the files, where the prefix of the model without a head may be
    missing. Raises CheckpointError unless the tensors are those of the model: none missing, none
    more, each of its shape."""
    computed = (*COMPUTED, *family.buffers)
    unmatched = {}
    for name, tensor in files.tensors.items():
        if not name.endswith(computed):
            unmatched[name] = tensor
    names = names_in_files(wanted, unmatched, family)
    missing = [name for name in names.values() if name not in unmatched]
    misshapen = []
    for theirs, stored in wanted.items():
        found = unmatched.pop(names[theirs], None)
        if found is not None and found.shape != stored.shape:
            misshapen.append(f"{theirs} {found.shape} where {stored.shape} is needed")
        elif found is not None and not found.dtype.is_floating_point:
            misshapen.append(
                f"{theirs} of type {found.dtype} where a floating-point type is needed"
            )
    if model_config.tie_word_embeddings:
        check_tied_head(files, unmatched, names, family)
    problems = []
    if missing:
        problems.append(f"missing: {some(sorted(missing))}")
    if unmatched:
        problems.append(f"not known: {some(list(unmatched))}")
    if misshapen:
        problems.append(f"of the wrong shape or type: {some(misshapen)}")
    if problems:
        raise CheckpointError(
            f"{files.folder}: its tensors are not those of the model that its config.json "
            f"describes; {'; '.join(problems)}"
        )
    return names


def names_in_files(
    wanted: Iterable[str],
    available: Collection[str],
    family: Family,
) -> dict[str, str]:
    """Their name -> the name that it should have in the files: without the prefix of the model with
    a head, or with another end, as some files have it."""
    has_prefix = any(name.startswith(family.base) for name in available)
    names = {}
    for theirs in wanted:
        name = theirs if has_prefix else theirs.removeprefix(family.base)
        for end, other_end in family.aliases.items():
            other = name.removesuffix(end) + other_end
            if name not in available and name.endswith(end) and other in available:
                name = other
        names[theirs] = name
    return names


def check_tied_head(
    files: WeightFiles,
    unmatched: dict[str, StoredTensor],
    names: Mapping[str, str],
    family: Family,
) -> None:
    """With tied embeddings the head may be left out of the files, or be there a second time and the
    same; then it is taken out of `unmatched`. Raises CheckpointError where it is another matrix."""
    head = theirs_of(family, "head.weight")[0]
    embed = names[theirs_of(family, "embed.weight")[0]]
    if unmatched.pop(head, None) is None or embed not in files.tensors:
        return
    if not files.read(head).equal(files.read(embed)):
        raise CheckpointError(
            f"{files.folder}: config.json ties the head to the embedding, but the files hold two "
            "different matrices; set tie_word_embeddings to false there if the head is a matrix of "
            "its own"
        )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    if more > 0:
        text += f" and {more} more"
    return text
