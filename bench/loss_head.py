"""The fused loss head against the plain form: time and peak memory, forward and backward, 8,192 rows x 50,257 words.

Goals: peak memory at most 1/5 of the plain form, time at most 1.1x. Plain is F.cross_entropy(hidden @ weight.T).
Memory is the peak of a process that does one side once, less that of a process that only makes the inputs; both are written.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import alternate, arguments, medians, peak_rss_bytes, print_table, write_result
from torch import Tensor

from longfire.ops.cross_entropy import linear_cross_entropy


def plain(hidden_ND: Tensor, weight_WD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(hidden_ND @ weight_WD.T, labels_N, reduction="sum")


def inputs_only(hidden_ND: Tensor, weight_WD: Tensor, labels_N: Tensor) -> Tensor:
    return hidden_ND.sum() + weight_WD.sum()


SIDES = {"fused": linear_cross_entropy, "plain": plain, "inputs": inputs_only}


def inputs(rows: int, words: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden_ND, weight_WD = torch.randn(rows, size, requires_grad=True), torch.randn(words, size)
    return hidden_ND, (weight_WD * size**-0.5).requires_grad_(), torch.randint(words, (rows,))


def forward_backward(form: Callable[..., Tensor], made: tuple[Tensor, Tensor, Tensor]) -> None:
    """Gradients are thrown away, so that each call allocates its own."""
    torch.autograd.grad(form(*made) / len(made[0]), made[:2])


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], rows=8192, words=50257, size=512, repeats=5, side=""
    )
    if options.quick and not options.side:
        options.rows, options.words, options.size, options.repeats = 1024, 8192, 64, 2
    made = inputs(options.rows, options.words, options.size)
    if options.side:
        forward_backward(SIDES[options.side], made)
        return
    sizes = [
        word for name in ("rows", "words", "size") for word in (f"--{name}", getattr(options, name))
    ]
    peaks = {side: peak_rss_bytes([__file__, *sizes, "--side", side]) for side in SIDES}
    runs = {
        side: lambda side=side: forward_backward(SIDES[side], made) for side in ("fused", "plain")
    }
    times = medians(alternate(runs, options.repeats))
    flops = 3 * 2 * options.rows * options.words * options.size
    rows = [
        {
            "side": side,
            "seconds": times[side],
            "GFLOP/s": flops / times[side] / 1e9,
            "peak MB": peaks[side] / 1e6,
            "above inputs MB": (peaks[side] - peaks["inputs"]) / 1e6,
        }
        for side in runs
    ]
    ratios = {
        "time (goal 1.1)": times["fused"] / times["plain"],
        "peak memory (goal 0.2)": peaks["fused"] / peaks["plain"],
        "memory above the inputs": rows[0]["above inputs MB"] / rows[1]["above inputs MB"],
    }
    print_table(
        f"loss head: {options.rows} rows x {options.words} words, D {options.size}, fp32", rows
    )
    print_table("fused / plain", [{"what": what, "ratio": ratio} for what, ratio in ratios.items()])
    sizes = {"rows": options.rows, "words": options.words, "size": options.size}
    write_result("loss_head", {"sizes": sizes, "sides": rows, "ratios": ratios}, options.quick)


if __name__ == "__main__":
    main()
