"""Matrix products of 8-bit numbers."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import setting


@dataclass(frozen=True)
class Float8:
    """Linear layers whose products are of 8-bit numbers, with dynamic scales."""

    enable_float8_linear: bool = setting(
        False,
        "multiply matrices of mixers and MLPs as 8-bit numbers, in forward and backward, where "
        "training reads them; weights, gradients, optimizer and checkpoints stay what they are",
    )
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = setting(
        "tensorwise",
        "what shares a scale. tensorwise: each matrix, gradients as e5m2; rowwise: each row of a "
        "factor, all as e4m3; rowwise_with_gw_hp: the same, and gradients of weights are made of "
        "numbers in model.compute_dtype",
    )
    filter_fqns: tuple[str, ...] = setting(
        (),
        "matrices with one of these in their names, as mlp.down_proj,layers.0., keep "
        "model.compute_dtype",
    )
    enable_fsdp_float8_all_gather: bool = setting(
        False,
        "sharded matrices that multiply 8-bit numbers travel in a form from which the same 8-bit "
        "numbers follow: with recipe_name = tensorwise as 8-bit numbers, with the others in "
        "bfloat16, rounded to odd; false: in float32. No result changes",
    )
    emulate: bool = setting(
        False,
        "round to 8 bits, and multiply in float32: the same on any device, slower than without "
        "float8",
    )
