"""Models of transformers in files: weights read, a model saved and compared."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from longfire.config.transformers_config import TransformersConfig
from longfire.errors import CheckpointError
from longfire.huggingface.check import (
    Check,
    check_bytes,
    ids_for,
    kl,
    load_peer,
    name_of,
    tolerated_kl,
)
from longfire.huggingface.comparing import check, quiet_transformers
from longfire.huggingface.transformers_model import (
    NAMES_SHOWN,
    TransformersModel,
    config_of,
    first_lines,
)


def load_weights(folder: Path | str, model_config: TransformersConfig) -> dict[str, Tensor]:
    """The state dict of `TransformersModel` from a folder of their weights, fp32; of pickles only
    the tensors are read.

    Raises CheckpointError naming what is missing, unknown or of another shape.
    """
    try:
        theirs, wrong = load_peer(folder, config_of(model_config.config))
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load its weights ({first_lines(error)})"
        ) from error
    if wrong:
        raise CheckpointError(
            f"{folder}: its tensors are not those of the model that model.config describes: "
            f"{first_of_each(wrong)}"
        )
    return TransformersModel(model_config, theirs).state_dict()


def first_of_each(wrong: dict[str, list[str]]) -> dict[str, list[str]]:
    """The first names of each kind of problem."""
    return {kind: names[:NAMES_SHOWN] for kind, names in wrong.items()}


def save(
    model: TransformersModel,
    folder: Path,
    dtype: torch.dtype,
    ends: dict[str, int | None],
    shard_bytes: int,
) -> None:
    """Write their model into a folder, as they do. ends: bos_token_id and eos_token_id."""
    config = copy.deepcopy(model.theirs.config)
    config.update(ends)
    # A new model and no copy: some keep what they computed last, which cannot be copied.
    with torch.device("meta"), quiet_transformers():
        written = type(model.theirs)(config)
    weights = {}
    for name, tensor in model.theirs.state_dict().items():
        weights[name] = tensor.detach().to(dtype)
    written.load_state_dict(weights, assign=True)
    written.tie_weights()
    with quiet_transformers():
        written.save_pretrained(folder, max_shard_size=shard_bytes)


@torch.no_grad()
def compare_saved(
    model: TransformersModel,
    folder: Path,
    dtype: torch.dtype,
) -> Check:
    """Compare what was saved with the model it was made of. Raises CheckpointError naming the
    difference."""
    device = next(model.parameters()).device
    again, wrong = load_peer(folder)
    name = type(again).__name__
    check(not wrong, f"{name} does not find its tensors: {first_of_each(wrong)}")
    given = dict(model.theirs.named_parameters())
    read = dict(again.named_parameters())
    check(given.keys() == read.keys(), "the model that was read has other parameters")
    for parameter_name, parameter in given.items():
        rounded = parameter.to(dtype).float().cpu()
        check_bytes(rounded, read[parameter_name], parameter_name, folder)
    ids_BT = ids_for(model.config, device)
    # In fp32 whatever the run computes in.
    logits_BTV = TransformersModel(model.config, model.theirs)(ids_BT)
    own_kl = kl(logits_BTV, TransformersModel(model.config, again).to(device)(ids_BT))
    if dtype == torch.float32:
        tolerated = tolerated_kl(logits_BTV, model.config.num_hidden_layers, device)
        check(
            own_kl <= tolerated,
            f"logits after reloading differ: KL {own_kl:.1e}, tolerated {tolerated:.1e}",
        )
    return Check(
        tensors=len(given),
        memory_bytes=sum(parameter.numel() for parameter in given.values()) * dtype.itemsize,
        dtype=name_of(dtype),
        tokens=ids_BT.numel(),
        own_kl=own_kl,
        peer=name,
        peer_kl=None,
        peer_absent="it is the class that was trained",
    )
