"""The rules that every run must keep, checked before data or a device is touched. Each rule names
the key, the number and the fix of what it refuses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from longfire.config.rules import data, float8, lengths, model, processes, steps, tasks
from longfire.config.run_settings import RunSettings
from longfire.errors import SettingsError


@dataclass(frozen=True)
class Rule:
    """refusals: yields a message for each thing that is refused.

    applies_to: `trained`: not to a run that is only read, whose processes need not be here;
    `started`: not to a run that is only planned, whose weights need not be here.
    """

    refusals: Callable[[RunSettings], Iterator[str]]
    applies_to: Literal["all", "trained", "started"] = "all"


RULES = (
    Rule(processes.of_pipeline, "trained"),
    Rule(processes.of_shared_parts, "trained"),
    Rule(processes.of_context_settings, "trained"),
    Rule(processes.of_sharding_settings, "trained"),
    Rule(processes.of_several_processes, "trained"),
    Rule(processes.of_parameters_in_pieces, "trained"),
    Rule(steps.of_batch, "trained"),
    Rule(steps.of_decay, "trained"),
    Rule(steps.of_drops, "trained"),
    Rule(steps.of_length),
    Rule(lengths.refusals),
    Rule(model.of_direction),
    Rule(model.of_learning_rates),
    Rule(model.of_outputs),
    Rule(model.of_auxiliary_losses),
    Rule(model.of_mlp),
    Rule(model.of_attention),
    Rule(model.of_accuracy),
    Rule(model.of_recomputed_layers),
    Rule(model.of_policy),
    Rule(model.of_optimizer),
    Rule(model.of_backend),
    Rule(float8.of_float8, "trained"),
    Rule(data.of_data),
    Rule(data.of_records),
    Rule(data.of_validation),
    Rule(data.of_tokenizer),
    Rule(data.of_start, "started"),
    Rule(data.of_checkpoints),
    Rule(data.of_best_checkpoints, "trained"),
    Rule(data.of_folders),
    Rule(tasks.of_task),
)


def check(run: RunSettings, trains: bool = True, planned: bool = False) -> None:
    """Raises SettingsError with every message of the rules.

    trains: False for a run that is only read. planned: the run is only planned.
    """
    problems: list[str] = []
    for rule in RULES:
        if rule.applies_to == "trained" and not trains:
            continue
        if rule.applies_to == "started" and planned:
            continue
        problems += rule.refusals(run)
    if problems:
        raise SettingsError("\n".join(problems))
