"""Numbers in files, and how to read them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent
FLA_CASES = sorted(path.stem for path in HERE.glob("*.safetensors"))


class Golden(NamedTuple):
    """One run of fla's own class (make_fla_golden.py). weights and grads under their names; labels are the ids themselves."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    grads: dict[str, Tensor]
    ids_BT: Tensor
    logits_BTW: Tensor
    loss: Tensor


def read(case: str, folder: Path = HERE) -> Golden:
    with safe_open(folder / f"{case}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    weights, grads = (
        {
            name.removeprefix(kind): tensor
            for name, tensor in tensors.items()
            if name.startswith(kind)
        }
        for kind in ("weight/", "grad/")
    )
    return Golden(config, weights, grads, tensors["ids"], tensors["logits"], tensors["loss"])
