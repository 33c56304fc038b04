"""Chunkwise GLA and gated delta rule against their recurrent form, forward and backward; and how the cost grows with length.

Goals (issue 2): at T = 2048 at least 10 times as fast as the recurrent form; from T = 2k to T = 16k at most 8.8 times the cost.
Both are eager, fp32, with an initial state and gradients of every input. The recurrent form is the readable truth of
`longfire doctor`, a loop over tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import alternate, arguments, medians, print_table, write_result
from torch import Tensor

from longfire.ops.delta_rule import delta_rule_chunkwise, delta_rule_slow
from longfire.ops.linear_attention import linear_attention_chunkwise, linear_attention_slow

B, H, K, V = 1, 4, 64, 128
FASTER, GROWTH = 10.0, 8.8
FORMS = {
    "GLA (vector decay)": (linear_attention_chunkwise, linear_attention_slow),
    "gated delta rule (scalar decay)": (delta_rule_chunkwise, delta_rule_slow),
}


def inputs(name: str, T: int) -> list[Tensor]:
    """q, k, v, [beta,] g, initial state, as a mixer gives them."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, H, K, generator=draw) for _ in range(2))
    v, state = torch.randn(B, T, H, V, generator=draw), torch.randn(B, H, K, V, generator=draw)
    if name.startswith("GLA"):
        made = [q, k, v, F.logsigmoid(torch.randn(B, T, H, K, generator=draw)) / 16, state]
    else:
        beta, g = torch.rand(B, T, H, generator=draw), F.logsigmoid(torch.randn(B, T, H, generator=draw))
        made = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, g, state]
    return [x.requires_grad_() for x in made]


def forward_backward(form: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        o, state = form(*tensors[:-1], initial_state_BHKV=tensors[-1])
        torch.autograd.grad((o, state), tensors, (torch.ones_like(o), torch.ones_like(state)))

    return run


def main() -> None:
    options = arguments(__doc__.splitlines()[0], tokens=2048, repeats=7)
    T, repeats = (256, 2) if options.quick else (options.tokens, options.repeats)
    speed, growth = [], []
    for name, (chunkwise, recurrent) in FORMS.items():
        short, long = inputs(name, T), inputs(name, 8 * T)
        compared = {"chunkwise": forward_backward(chunkwise, short), "recurrent": forward_backward(recurrent, short)}
        grown = {"short": compared["chunkwise"], "long": forward_backward(chunkwise, long)}
        times, cost = medians(alternate(compared, max(2, repeats // 2))), medians(alternate(grown, repeats))
        ratio = times["recurrent"] / times["chunkwise"]
        speed.append({"op": name, **{f"{form} s": time for form, time in times.items()}, "ratio": ratio,
                      "goal": f">= {FASTER:g}", "reached": ratio >= FASTER})  # fmt: skip
        ratio = cost["long"] / cost["short"]
        growth.append({"op": name, f"{T} tokens s": cost["short"], f"{8 * T} tokens s": cost["long"], "ratio": ratio,
                       "goal": f"<= {GROWTH:g}", "reached": ratio <= GROWTH})  # fmt: skip
    sizes = f"forward and backward, B {B}, H {H}, K {K}, V {V}, fp32, {torch.get_num_threads()} threads"
    print_table(f"T {T}: {sizes}", speed)
    print_table(f"chunkwise: {sizes}", growth)
    write_result("recurrent_ops", {"sizes": sizes, "tokens": T, "speed": speed, "growth": growth}, options.quick)


if __name__ == "__main__":
    main()
