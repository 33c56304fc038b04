"""The chunkwise recurrences against their recurrent form, forward and backward; and how the cost grows with length.

Goals: at T = 2048 at least 10 times as fast as the recurrent form; from T = 2k to T = 16k at most 8.8 times the cost.
All are eager, fp32, with an initial state and gradients of every input. The recurrent form is the readable reference implementation of
`longfire doctor`, a loop over tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import alternate, arguments, medians, print_table, write_result
from torch import Tensor

from longfire.ops.delta_rule import delta_rule_reference
from longfire.ops.dplr import dplr_reference
from longfire.ops.fast.delta_rule import delta_rule_chunkwise
from longfire.ops.fast.dplr import dplr_chunkwise
from longfire.ops.fast.linear_attention import linear_attention_chunkwise
from longfire.ops.linear_attention import linear_attention_reference

B, H, K, V = 1, 4, 64, 128
SLOTS = K  # the values of the first pass
FASTER, GROWTH = 10.0, 8.8
FORMS = {
    "GLA (vector decay)": (linear_attention_chunkwise, linear_attention_reference),
    "GSA, first pass (value decay)": (linear_attention_chunkwise, linear_attention_reference),
    "gated delta rule (scalar decay)": (delta_rule_chunkwise, delta_rule_reference),
    "RWKV-7 (diagonal plus low rank)": (dplr_chunkwise, dplr_reference),
}


def inputs(name: str, T: int) -> dict[str, Tensor]:
    """The arguments by name, as a mixer gives them."""
    draw = torch.Generator().manual_seed(0)
    values = SLOTS if name.startswith("GSA") else V
    q, k = (torch.randn(B, T, H, K, generator=draw) for _ in range(2))
    v, state = (
        torch.randn(B, T, H, values, generator=draw),
        torch.randn(B, H, K, values, generator=draw),
    )
    vector = F.logsigmoid(torch.randn(B, T, H, K, generator=draw)) / 16
    made = {"q_BTHK": q, "k_BTHK": k, "v_BTHV": v, "initial_state_BHKV": state}
    if name.startswith("GLA"):
        made["g"] = vector
    elif name.startswith("GSA"):
        made["gv"] = vector
    elif name.startswith("RWKV"):
        key, rate = F.normalize(k, dim=-1), torch.rand(B, T, H, K, generator=draw)
        made |= {"c_BTHK": -key, "b_BTHK": key * rate, "g_BTHK": vector}
    else:
        beta, g = (
            torch.rand(B, T, H, generator=draw),
            F.logsigmoid(torch.randn(B, T, H, generator=draw)),
        )
        made |= {
            "q_BTHK": F.normalize(q, dim=-1),
            "k_BTHK": F.normalize(k, dim=-1),
            "beta_BTH": beta,
            "g": g,
        }
    return {name: x.requires_grad_() for name, x in made.items()}


def forward_backward(
    form: Callable[..., tuple[Tensor, Tensor]], made: dict[str, Tensor]
) -> Callable[[], None]:
    def run() -> None:
        outputs = form(**made)
        torch.autograd.grad(outputs, list(made.values()), [torch.ones_like(o) for o in outputs])

    return run


def main() -> None:
    options = arguments(__doc__.splitlines()[0], tokens=2048, repeats=7)
    T, repeats = (256, 2) if options.quick else (options.tokens, options.repeats)
    speed, growth = [], []
    for name, (chunkwise, recurrent) in FORMS.items():
        short, long = inputs(name, T), inputs(name, 8 * T)
        compared = {
            "chunkwise": forward_backward(chunkwise, short),
            "recurrent": forward_backward(recurrent, short),
        }
        grown = {"short": compared["chunkwise"], "long": forward_backward(chunkwise, long)}
        times, cost = (
            medians(alternate(compared, max(2, repeats // 2))),
            medians(alternate(grown, repeats)),
        )
        ratio = times["recurrent"] / times["chunkwise"]
        speed.append(
            {
                "op": name,
                **{f"{form} s": time for form, time in times.items()},
                "ratio": ratio,
                "goal": f">= {FASTER:g}",
                "reached": ratio >= FASTER,
            }
        )
        ratio = cost["long"] / cost["short"]
        growth.append(
            {
                "op": name,
                f"{T} tokens s": cost["short"],
                f"{8 * T} tokens s": cost["long"],
                "ratio": ratio,
                "goal": f"<= {GROWTH:g}",
                "reached": ratio <= GROWTH,
            }
        )
    sizes = f"forward and backward, B {B}, H {H}, K {K}, V {V} (GSA: {SLOTS} slots), fp32, {torch.get_num_threads()} threads"
    print_table(f"T {T}: {sizes}", speed)
    print_table(f"chunkwise: {sizes}", growth)
    write_result(
        "recurrent_ops",
        {"sizes": sizes, "tokens": T, "speed": speed, "growth": growth},
        options.quick,
    )


if __name__ == "__main__":
    main()
