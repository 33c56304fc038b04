"""A folder of Hugging Face weights -> a model. Safetensors only: nothing that is read can run code."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.errors import CheckpointError, SettingsError
from longfire.hub.families import BUFFERS, family_of, shape_from_config
from longfire.model import Model
from longfire.shape import ModelShape, read_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NAMED = 4  # wrong tensors that a message lists


def load_model(
    folder: Path | str, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32
) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a folder of Hugging Face weights. Raises SettingsError, CheckpointError, DataError."""
    folder = Path(folder)
    shape = shape_from_config(read_config(folder), str(folder / "config.json"))
    if not shape.vocab_size:
        raise SettingsError(
            f"{folder / 'config.json'}: vocab_size = 0, but weights have words: write the rows of their embedding"
        )
    return model_of(shape, load_weights(folder, shape), device, compute_dtype), from_folder(folder)


def model_of(
    shape: ModelShape,
    weights: dict[str, Tensor],
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Model:
    """A model whose parameters are these very tensors (no second copy where they lie on the device already)."""
    with torch.device("meta"):
        model = Model(shape, compute_dtype)
    if shape.tie_word_embeddings:
        weights = {**weights, "head.weight": weights["embed.weight"]}
    model.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
    if shape.tie_word_embeddings:
        model.head.weight = model.embed.weight  # assigning gave each a parameter of its own
    return model


def load_weights(folder: Path | str, shape: ModelShape) -> dict[str, Tensor]:
    """The state dict of `Model(shape)` from a folder's safetensors files, fp32, one tensor of one shard in memory at a time.

    Raises CheckpointError naming missing, extra and wrongly shaped tensors, or the file that cannot be read.
    """
    folder = Path(folder)
    family = family_of(read_config(folder), str(folder / "config.json"))
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Model(shape).state_dict().items()}
    weights: dict[str, Tensor] = {}
    extra, misshapen = [], []
    for theirs, tensor in tensors(folder):
        ours = family.to_ours(theirs)
        if ours not in expected or ours in weights:
            extra.append(theirs)
        elif tuple(tensor.shape) != expected[ours]:
            misshapen.append(f"{theirs} {tuple(tensor.shape)} where {expected[ours]} is needed")
        elif not tensor.is_floating_point():
            misshapen.append(f"{theirs} of type {tensor.dtype} where a floating-point type is needed")
        else:
            weights[ours] = tensor.to(torch.float32, copy=True)  # a copy: the tensor is a view of the mapped file
    tied_head(weights, shape, folder)
    missing = [family.to_theirs(name) for name in expected.keys() - weights.keys()]
    wrong = {"missing": sorted(missing), "not known": extra, "of the wrong shape or type": misshapen}
    if any(wrong.values()):
        raise CheckpointError(
            f"{folder}: its tensors are not those of the model that model.config describes; "
            + "; ".join(f"{kind}: {some(names)}" for kind, names in wrong.items() if names)
        )
    return weights


def tied_head(weights: dict[str, Tensor], shape: ModelShape, folder: Path) -> None:
    """With tied embeddings the head may be left out of the files, or be there a second time and the same."""
    if not shape.tie_word_embeddings or "embed.weight" not in weights:
        return
    head = weights.get("head.weight")
    if head is not None and not head.equal(weights["embed.weight"]):
        raise CheckpointError(
            f"{folder}: config.json ties the head to the embedding, but the files hold two different matrices; set "
            "tie_word_embeddings to false there if the head is a matrix of its own"
        )
    weights["head.weight"] = weights["embed.weight"]


def some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a folder's safetensors files, without buffers that are computed."""
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (it is no dict)
                    if not name.endswith(BUFFERS):
                        yield name, shard.get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({e}); copy or download it again") from e


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: those of the index, or the single one. Raises CheckpointError."""
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        raise CheckpointError(
            f"{folder}: neither {SINGLE} nor {INDEX} is there"
            + (f" ({', '.join(others[:NAMED])} could run code when read, or is of another kind)" if others else "")
            + "; save the model as safetensors: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise CheckpointError(f"{folder / INDEX}: not an index of safetensors files ({e})") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {name!r} is not the name of a safetensors file in the same folder"
            )
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: the index names it, but it is not there; copy or download it again"
            )
    return [folder / name for name in names]
