"""Which layers are on which process of a pipeline: stages of equal cost or begun where asked for,
placed as the schedule wants.

loop   stages 0 1 2 3 on processes 0 1 0 1
v      stages 0 1 2 3 on processes 0 1 1 0
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from longfire.config.model_config import ModelConfig
from longfire.config.settings import Parallelism
from longfire.config.transformers_config import TransformersConfig
from longfire.errors import SettingsError
from longfire.regular_files import read_regular

if TYPE_CHECKING:
    from longfire.model import Model

# schedule of torch.distributed.pipelining -> stages of a process, unless points say otherwise
STAGES_EACH = {
    "GPipe": 1,
    "1F1B": 1,
    "LoopedBFS": 2,
    "Interleaved1F1B": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}
ONE_STAGE = {"GPipe", "1F1B"}
V_SHAPED = {"ZBVZeroBubble", "DualPipeV"}  # two stages a process, always
ROUNDS = {"Interleaved1F1B", "InterleavedZeroBubble"}  # micro-batches go in rounds of equal size
ENTRY = re.compile(r"(?<![0-9])([0-9]{1,6})(F|B|I|W)([0-9]{1,6})(?![0-9])")  # of an order
KEYS = ("schedule", "schedule_csv", "split_points", "microbatches", "degree")
SCHEDULE, CSV, POINTS, MICROBATCHES, DEGREE = (
    f"parallelism.pipeline_parallel_{key}" for key in KEYS
)


class Pipelined(Protocol):
    """parallel/pipeline.Pipeline, as a model sees it: its layers in this process, by stages."""

    @property
    def stages(self) -> "Iterable[Model]": ...


@dataclass(frozen=True)
class StageLayout:
    """Of each stage: its layers (none is empty) and the process along pp that it is on."""

    layers: tuple[range, ...]
    processes: tuple[int, ...]

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.layers)

    def on(self, process: int) -> list[int]:
        """The stages that are on a process, in order."""
        found: list[int] = []
        for stage, where in enumerate(self.processes):
            if where == process:
                found.append(stage)
        return found


@dataclass(frozen=True)
class ScheduleOrder:
    """What a CSV file says: micro-batches, and the process of each stage. A row a process:
    0F0,0F1,,0B0 ... (I and W: its halves)."""

    microbatches: int
    processes: tuple[int, ...]


def layout(
    costs: list[float],
    processes: int,
    parallelism: Parallelism,
) -> StageLayout:
    """costs: of embedding, each layer, head. The same on every process that asks."""
    placed = placement(processes, parallelism)
    points = begins(parallelism) or cheapest(costs, len(placed))
    ends = [*points[1:], len(costs) - 2]
    layers = tuple(map(range, points, ends))
    return StageLayout(layers, placed)


def placement(processes: int, parallelism: Parallelism) -> tuple[int, ...]:
    """The process of each stage."""
    if parallelism.pipeline_parallel_schedule_csv:
        return read_order(parallelism.pipeline_parallel_schedule_csv).processes
    name = parallelism.pipeline_parallel_schedule
    points = begins(parallelism)
    stages = len(points) or processes * STAGES_EACH[name]
    forth = list(range(processes))
    if name in V_SHAPED:
        return (*forth, *reversed(forth))
    return tuple(stage % processes for stage in range(stages))


def begins(parallelism: Parallelism) -> list[int]:
    """The first layer of each stage as the settings name them; none if they do not."""
    points = parallelism.pipeline_parallel_split_points
    if not points:
        return []
    layers = [0]
    for point in points:
        layer = re.fullmatch(r"layers\.(\d+)", point)
        if layer is None:
            raise SettingsError(
                f"{POINTS} = {','.join(points)}: a stage begins with a layer; write layers.NUMBER "
                "for each"
            )
        layers.append(int(layer[1]))
    return layers


Division = tuple[float, float, list[int]]  # dearest stage, sum of squares, first layers of stages


def cheapest(costs: list[float], stages: int) -> list[int]:
    """The first layer of each stage such that the dearest stage is as cheap as can be; of equal
    ones those of least squares.

    The first stage bears the embedding, the last one the head. Say costs 0 1 1 1 1 2 in 2 stages:
    layers 0 to 2 (3), 3 (3).
    """
    embed, *layers, head = costs
    layers[0] += embed
    layers[-1] += head
    sums = [0.0]
    for cost in layers:
        sums.append(sums[-1] + cost)
    best: dict[int, Division] = {0: (0.0, 0.0, [])}  # by the number of layers so far
    for stage in range(stages):
        last = len(layers) - (stages - 1 - stage)  # the stages that follow have a layer each
        ends = range(stage + 1, last + 1) if stage < stages - 1 else [len(layers)]
        best = {end: with_one_more_stage(best, sums, end) for end in ends}
    return best[len(layers)][2]


def with_one_more_stage(
    best: dict[int, Division],
    sums: list[float],
    end: int,
) -> Division:
    """The best division of the layers before `end`, given those with one stage less. sums: costs
    of all layers before each."""
    divisions: list[Division] = []
    for begin, (dearest, squares, points) in best.items():
        if begin < end:
            cost = sums[end] - sums[begin]
            divisions.append((max(dearest, cost), squares + cost**2, [*points, begin]))
    return min(divisions)


@lru_cache(4)
def read_order(file: str) -> ScheduleOrder:
    """Raises SettingsError naming the file and what is wrong with it."""
    try:
        lines = read_regular(Path(file)).decode().splitlines()
    except OSError as error:
        raise SettingsError(f"{CSV} = {file!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{CSV} = {file!r} is no text in UTF-8: {error.reason}") from error
    actions = actions_in(lines)
    where: dict[int, int] = {}
    microbatches = 0
    for action in actions:
        where[action.stage] = action.process
        microbatches = max(microbatches, action.microbatch + 1)
    stages = len(where)
    if not is_complete(actions, where, microbatches):
        raise SettingsError(
            f"{CSV} = {file!r} is no order of forwards and backwards: a row a process, and in "
            "them once for each stage and micro-batch STAGEFmicrobatch and STAGEBmicrobatch (or "
            "STAGEI... and STAGEW...), a stage always on one process, counted from 0"
        )
    return ScheduleOrder(microbatches, tuple(where[stage] for stage in range(stages)))


class Action(NamedTuple):
    """One entry of a file with an order. kind: F, B, I or W."""

    process: int
    stage: int
    kind: str
    microbatch: int


def actions_in(lines: list[str]) -> list[Action]:
    """The entries of all processes, each of which has a line. Numbers of more than 6 digits count
    no stages and micro-batches of any machine: they are no entries."""
    found: list[Action] = []
    for process, line in enumerate(lines):
        for stage, kind, microbatch in ENTRY.findall(line):
            found.append(Action(process, int(stage), kind, int(microbatch)))
    return found


def is_complete(
    actions: list[Action],
    where: dict[int, int],
    microbatches: int,
) -> bool:
    """Whether every stage has one forward and one backward of each micro-batch, whole or in two
    halves, on its own process. where: the process of each stage."""
    by_kind: dict[str, list[tuple[int, int]]] = {letter: [] for letter in "FBIW"}
    for action in actions:
        if where[action.stage] == action.process:
            by_kind[action.kind].append((action.stage, action.microbatch))
    forwards, wholes, firsts, seconds = map(sorted, by_kind.values())
    if len(forwards) != len(where) * microbatches:
        return False
    wanted = list(product(range(len(where)), range(microbatches)))
    has_backwards = sorted(wholes + firsts) == wanted and firsts == seconds
    return bool(wanted) and forwards == wanted and has_backwards


def refusals(
    config: ModelConfig | TransformersConfig,
    processes: int,
    parallelism: Parallelism,
    microbatches: int,
    distilled: bool = False,
) -> Iterator[str]:
    """Why a run of `microbatches` a step cannot have its layers shared by so many processes: key,
    number and fix of each reason."""
    if isinstance(config, TransformersConfig):
        yield (
            f"{DEGREE} = {processes}: a model of transformers (model.backend) is not cut into "
            "stages; set it to 1"
        )
        return
    if distilled:
        yield (
            f"{DEGREE} = {processes}: a teacher's hidden states and logits are compared with a "
            "whole model's; set it to 1, or distillation.teacher to ''"
        )
    unreadable = list(misspelled(parallelism))
    yield from unreadable
    if unreadable:
        return
    placed = placement(processes, parallelism)
    points = begins(parallelism)
    yield from wrong_stages(config.num_hidden_layers, processes, parallelism, placed, points)
    yield from wrong_microbatches(processes, len(placed), parallelism, microbatches)


def misspelled(parallelism: Parallelism) -> Iterator[str]:
    """What of a pipeline's settings cannot be read, for any number of processes."""
    name = parallelism.pipeline_parallel_schedule
    if not parallelism.pipeline_parallel_schedule_csv and name not in STAGES_EACH:
        yield f"{SCHEDULE} = {name!r} is none of {', '.join(STAGES_EACH)}"
        return
    try:
        placement(1, parallelism)
    except SettingsError as error:
        yield str(error)


def wrong_stages(
    layers: int,
    processes: int,
    parallelism: Parallelism,
    placed: tuple[int, ...],
    points: list[int],
) -> Iterator[str]:
    """Why the layers cannot have these stages."""
    name = parallelism.pipeline_parallel_schedule
    stages = len(placed)
    points_text = ",".join(parallelism.pipeline_parallel_split_points)
    if parallelism.pipeline_parallel_schedule_csv:
        if set(placed) != set(range(processes)):
            yield (
                f"{CSV} has stages on {len(set(placed))} processes, {DEGREE} is {processes}: make "
                "them equal"
            )
        if points and len(points) != stages:
            yield (
                f"{POINTS} = {points_text} makes {len(points)} stages, {CSV} has {stages}: name "
                f"{stages - 1} points"
            )
    elif points and (len(points) % processes or (name in ONE_STAGE and len(points) != processes)):
        what = "as many" if name in ONE_STAGE else "a multiple of as many"
        yield (
            f"{POINTS} = {points_text} makes {len(points)} stages for {processes} processes: "
            f"{name} takes {what}"
        )
    elif points and name in V_SHAPED and len(points) != 2 * processes:
        yield (
            f"{POINTS} = {points_text} makes {len(points)} stages: {name} takes two a process, "
            f"which are {2 * processes}"
        )
    if points != sorted(set(points)) or points[-1:] >= [layers]:
        yield (
            f"{POINTS} = {points_text}: name layers that follow each other, from layers.1 to "
            f"layers.{layers - 1}"
        )
    if stages > layers:
        yield (
            f"{DEGREE} = {processes} makes {stages} stages of {layers} layers: at most one stage "
            "a layer; lower it, or take a schedule with fewer stages, as 1F1B"
        )


def wrong_microbatches(
    processes: int,
    stages: int,
    parallelism: Parallelism,
    microbatches: int,
) -> Iterator[str]:
    """Why the schedule cannot have this number of micro-batches."""
    name = parallelism.pipeline_parallel_schedule
    count_text = f"{MICROBATCHES}: {microbatches} microbatches a step"
    if file := parallelism.pipeline_parallel_schedule_csv:
        if microbatches != read_order(file).microbatches:
            yield f"{count_text}, but {CSV} orders {read_order(file).microbatches}; make them equal"
    elif name in {"1F1B", "DualPipeV"} and microbatches < stages:
        yield (
            f"{count_text} are fewer than the {stages} stages that {name} fills; ask for {stages} "
            "at least, or for another schedule"
        )
    elif name in ROUNDS and microbatches % max(1, microbatches // processes):
        rounds = max(1, microbatches // processes)
        yield (
            f"{count_text}: {name} sends them in {rounds} rounds of equal size; take a multiple of "
            f"{DEGREE} = {processes}"
        )
