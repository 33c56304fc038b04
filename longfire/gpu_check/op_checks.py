"""Every op on this device beside its reference, as `longfire doctor` compares them, bf16 first: at
small sizes, and at those of a block of a recipe."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from longfire.doctor.check import CASES, check
from longfire.doctor.op_cases import SIZES, Case, Sizes
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.json_types import JsonObject
from longfire.ops.choice import choose, describe
from longfire.plural import counted

# B, T, H, K, V, W; the cases need a multiple of 4 heads. A reference in float64 writes all T x T
# scores, and takes token after token.
RECIPE_SIZES = Sizes(1, 2048, 8, 128, 256, 2048)
SMALL_SIZES = {  # on a CPU: by whether the sizes are those of a recipe
    False: Sizes(1, 70, 4, 8, 12, 40),
    True: Sizes(1, 150, 4, 16, 24, 80),
}
LEAST_SECONDS = 5  # that must be left for another case
# Of a recipe's sizes fp32 is left out: fla's kernels are trained with in bf16.
DTYPES_OF = {False: (torch.bfloat16, torch.float32), True: (torch.bfloat16,)}


def measure(work: Work, is_recipe: bool) -> Outcome:
    """Check case after case in turns over the ops, as long as there is time.

    What a kernel raises is a finding, and the next case runs. After an error that the device does
    not recover from, every case raises, so that the rest is left out."""
    device = work.device
    choices = choose(device, "auto")
    sizes = sizes_of(work, is_recipe)
    rows: list[JsonObject] = []
    problems: list[str] = []
    missing: list[str] = []
    todo: list[tuple[Case, torch.dtype]] = []
    available = [case for case in CASES if not case.missing(device)]
    for dtype in DTYPES_OF[is_recipe]:
        todo += [(case, dtype) for case in in_turns(available)]
    worst = 0.0
    for count, (case, dtype) in enumerate(todo):
        if work.seconds_left < LEAST_SECONDS:
            missing.append(f"{len(todo) - count} of {len(todo)} cases: no time was left")
            break
        type_name = str(dtype).removeprefix("torch.")
        work.note(f"{case} ({type_name})")
        is_right, where, error = check(case, device, dtype, sizes)
        form = choices[case.op].name if case.op in choices else "torch"
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "type": type_name,
                "form": form,
                "right": is_right,
                "where": where,
                "error": error,
            }
        )
        if not is_right:
            problems.append(f"{case} ({form}, {type_name}): {where} {error}")
            if is_lost(device):
                left = len(todo) - count - 1
                missing.append(f"{left} cases: the device was lost after {case} ({type_name})")
                break
        else:
            worst = max(worst, float(error))
    row = (
        f"{sum(bool(one['right']) for one in rows)} of {counted(len(rows), 'case')} right, the "
        f"largest error of a right one {worst:.1e} of its largest value"
    )
    numbers: JsonObject = {"cases": rows, "forms": describe(choices)}
    return Outcome(row, numbers, tuple(problems), tuple(missing))


def sizes_of(work: Work, is_recipe: bool) -> Sizes:
    """B, T, H, K, V, W of the cases."""
    if work.is_small:
        return SMALL_SIZES[is_recipe]
    if is_recipe:
        return RECIPE_SIZES
    return SIZES[work.device.type]


def in_turns(cases: Sequence[Case]) -> Iterator[Case]:
    """The first case of each op, then the second of each: a short time shows something of all."""
    of_op: dict[str, list[Case]] = {}
    for case in cases:
        of_op.setdefault(case.op, []).append(case)
    for turn in range(max(len(some) for some in of_op.values())):
        for some in of_op.values():
            if turn < len(some):
                yield some[turn]


def is_lost(device: torch.device) -> bool:
    """Whether an error of the device makes every later call in this process fail."""
    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).add(1).cpu()
    except RuntimeError:
        return True
    return False


STAGES = (
    Stage("ops at small sizes", 120, 25, partial(measure, is_recipe=False)),
    Stage("ops at recipe sizes", 120, 25, partial(measure, is_recipe=True)),
)
