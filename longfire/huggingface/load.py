"""A folder of Hugging Face weights -> a model, one tensor at a time. Nothing that is read can run
code: safetensors, and of PyTorch's own files their tensors only."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig, placed
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.families import config_from_hf, family_of
from longfire.huggingface.family import Family
from longfire.huggingface.tensors import Stored, layout
from longfire.model import Model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
KINDS = {
    ".safetensors": (SINGLE, INDEX),
    ".bin": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
COMPUTED = (
    "rotary_emb.inv_freq",
)  # ends of names in old files of every family, beside its own `buffers`
NAMED = 4  # wrong tensors that a message lists


def load_model(
    folder: Path | str,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a folder of Hugging Face weights. Raises SettingsError,
    CheckpointError, DataError."""
    folder = Path(folder)
    model_config = model_config_in(folder)
    return model_of(
        model_config, load_weights(folder, model_config), device, compute_dtype
    ), from_folder(folder)


def model_config_in(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json describes, with words. Raises SettingsError."""
    where = str(folder / "config.json")
    with placed(where):
        model_config = config_from_hf(read_config(folder), where)
    if not model_config.vocab_size:
        raise SettingsError(
            f"{folder / 'config.json'}: vocab_size = 0, but weights have words: write the rows of their embedding"
        )
    return model_config


def model_of(
    model_config: ModelConfig,
    weights: dict[str, Tensor],
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Model:
    """A model whose parameters are these very tensors (no second copy where they lie on the device
    already)."""
    with torch.device("meta"):
        model = Model(model_config, compute_dtype)
    if model_config.tie_word_embeddings:
        weights = {**weights, "head.weight": weights["embed.weight"]}
    model.load_state_dict(
        {name: tensor.to(device) for name, tensor in weights.items()}, assign=True
    )
    if model_config.tie_word_embeddings:
        model.head.weight = model.embed.weight  # assigning gave each a parameter of its own
    return model


def load_weights(folder: Path | str, model_config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of `Model(shape)` from a folder's files, fp32. Raises CheckpointError as
    `read_weights` does."""
    weights = dict(read_weights(folder, model_config))
    if model_config.tie_word_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return weights


def read_weights(folder: Path | str, model_config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, fp32 tensor) of each parameter of `Model(shape)`, a tied head left out; one of
    their tensors in memory at a time.

    Names and shapes are compared before the first tensor is read. Raises CheckpointError naming
    missing, extra and wrongly shaped tensors, or the file that cannot be read.
    """
    folder = Path(folder)
    family = family_of(read_config(folder), str(folder / "config.json"))
    wanted = layout(family, model_config)
    files = Weights(folder)
    places = matched(wanted, files, family, model_config)
    for theirs, stored in wanted.items():
        for ours, part in stored.split(files.read(places[theirs])):
            yield (
                ours,
                part.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            )  # not a view of the file


def matched(
    wanted: dict[str, Stored], files: "Weights", family: Family, model_config: ModelConfig
) -> dict[str, str]:
    """Their name -> its name in the files, where the prefix of the model without a head may be
    missing. Raises CheckpointError unless the tensors are those of the model: none missing, none
    more, each of its shape."""
    computed = (*COMPUTED, *family.buffers)
    there = {name: tensor for name, tensor in files.tensors.items() if not name.endswith(computed)}
    bare = not any(name.startswith(family.base) for name in there)
    places = {theirs: theirs.removeprefix(family.base) if bare else theirs for theirs in wanted}
    for theirs, place in places.items():
        for end, other in family.aliases.items():
            if (
                place not in there
                and place.endswith(end)
                and place.removesuffix(end) + other in there
            ):
                places[theirs] = place.removesuffix(end) + other
    missing = [name for name in places.values() if name not in there]
    misshapen = []
    for theirs, stored in wanted.items():
        found = there.pop(places[theirs], None)
        if found is not None and found.shape != stored.shape:
            misshapen.append(f"{theirs} {found.shape} where {stored.shape} is needed")
        elif found is not None and not found.is_floating_point:
            misshapen.append(
                f"{theirs} of type {found.dtype} where a floating-point type is needed"
            )
    if model_config.tie_word_embeddings:
        refuse_another_head(files, there, places, family)
    wrong = {
        "missing": sorted(missing),
        "not known": list(there),
        "of the wrong shape or type": misshapen,
    }
    if any(wrong.values()):
        raise CheckpointError(
            f"{files.folder}: its tensors are not those of the model that its config.json describes; "
            + "; ".join(f"{kind}: {some(names)}" for kind, names in wrong.items() if names)
        )
    return places


def refuse_another_head(
    files: "Weights", there: dict[str, "Found"], places: dict[str, str], family: Family
) -> None:
    """With tied embeddings the head may be left out of the files, or be there a second time and the
    same."""
    head, embed = (
        next(rule.theirs for rule in family.names if rule.ours == f"{name}.") + "weight"
        for name in ("head", "embed")
    )
    if (
        there.pop(head, None)
        and places[embed] in files.tensors
        and not files.read(head).equal(files.read(places[embed]))
    ):
        raise CheckpointError(
            f"{files.folder}: config.json ties the head to the embedding, but the files hold two different matrices; set "
            "tie_word_embeddings to false there if the head is a matrix of its own"
        )


def some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Found:
    """A tensor that lies in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """The tensors in a folder's files, by the names that they have there. Opening reads no tensor;
    `read` reads one. Raises CheckpointError naming the file that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = {}
        self._file = Path()  # the one file that is open
        self._content = {}
        for file in weight_files(folder):
            for name, tensor in self._opened(file).items():
                self.tensors[name] = Found(file, tuple(tensor.shape), tensor.dtype)

    def read(self, name: str) -> Tensor:
        return self._opened(self.tensors[name].file)[name].tensor()

    def _opened(self, file: Path) -> Mapping[str, "Lazy"]:
        if file != self._file:
            self._file = Path()  # before the next one is opened
            self._content = {}
            try:
                self._content = (
                    from_safetensors(file) if file.suffix == ".safetensors" else from_bin(file)
                )
            except (OSError, SafetensorError) as e:
                raise CheckpointError(
                    f"{file}: cannot be read ({e}); copy or download it again"
                ) from e
            self._file = file
        return self._content


@dataclass(frozen=True)
class Lazy:
    """A tensor of an open file that is read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Callable[[], Tensor]


def from_safetensors(file: Path) -> dict[str, Lazy]:
    shard = safe_open(file, "pt")
    out = {}
    for name in shard.keys():  # noqa: SIM118 (it is no dict)
        piece = shard.get_slice(name)
        empty = (
            piece[:0] if piece.get_shape() else shard.get_tensor(name)
        )  # the only public way to its type
        out[name] = Lazy(
            tuple(piece.get_shape()), empty.dtype, lambda name=name: shard.get_tensor(name)
        )
    return out


def from_bin(file: Path) -> dict[str, Lazy]:
    """PyTorch's own format: a pickle of which only tensors and plain containers are made, whatever
    else it asks for."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file}: cut off, or of PyTorch before 1.6: its tensors cannot be mapped; copy it again, or save it anew as safetensors"
        )
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # what torch raises has no common class but this one
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(
            f"{file}: cannot be read as tensors alone ({reason}); it would have to run code, or is damaged"
        ) from e
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise CheckpointError(
            f"{file}: holds other things than tensors by name; save the state dict alone, as safetensors"
        )
    return {name: Lazy(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in content.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: those of an index, or the single one; safetensors
    before all others. Raises CheckpointError."""
    for suffix, (single, index) in KINDS.items():
        if (folder / index).exists():
            return indexed(folder, index, suffix)
        if (folder / single).exists():
            return [folder / single]
    others = sorted(
        path.name
        for pattern in ("*.pt", "*.pth", "*.gguf", "*.h5")
        for path in folder.glob(pattern)
    )
    raise CheckpointError(
        f"{folder}: none of {', '.join(name for names in KINDS.values() for name in names)} is there"
        + (
            f" ({', '.join(others[:NAMED])} could run code when read, or is of another kind)"
            if others
            else ""
        )
        + "; save the model as safetensors: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
    )


def indexed(folder: Path, index: str, suffix: str) -> list[Path]:
    """The files that an index names, all of which lie beside it."""
    try:
        names = sorted(
            set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        )
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise CheckpointError(f"{folder / index}: not an index of weight files ({e})") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(
                f"{folder / index}: {name!r} is not the name of a {suffix} file in the same folder"
            )
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: the index names it, but it is not there; copy or download it again"
            )
    return [folder / name for name in names]
