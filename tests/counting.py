"""A plugin that brings a task: to continue a sequence of numbers that grow by the same step.

    longfire train recipe.toml --model.plugins counting.py --job.task counting --job.task_options numbers=16

Its records need no file: record i is a pure function of the seed and i.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from longfire.config.model_config import ModelConfig
from longfire.config.settings import setting
from longfire.data.batch import Batch
from longfire.data.order import key
from longfire.loss import loss_sum, losses
from longfire.parallel.apply import device_of, reshard
from longfire.parallel.axes import DATA
from longfire.tasks.contract import Results, Task

UNSEEN = 2**40  # the number of the first record that is measured and not trained on


@dataclass(frozen=True)
class CountingOptions:
    numbers: int = setting(16, "numbers are counted modulo this", "[2, 256]")


class Counting(Task):
    """Records of T + 1 numbers: first + step * t modulo `numbers`."""

    Options: ClassVar[type] = CountingOptions
    unread: ClassVar[tuple[str, ...]] = ("tokenizer", "images", "classification")
    proven_axes: ClassVar[frozenset[str]] = frozenset(DATA)

    @classmethod
    def refusals(cls, run) -> Iterator[str]:
        if run.training.seq_len < 2:
            yield f"training.seq_len = {run.training.seq_len}: the step is seen after two numbers"

    def opened(self):
        return nullcontext()  # no file is read

    def begin(self) -> None:
        if self.mesh.rank() == 0:
            Path(self.run.folder, "counting.txt").write_text(f"{self.options.numbers}\n")

    @property
    def model_config(self) -> ModelConfig:
        return self.run.known_model_config.with_vocabulary(self.options.numbers)

    def records(self, first: int, count: int) -> Batch:
        """Records [first, first + count) of the run. The first label, the step, is not learned."""
        T = self.run.training.seq_len
        drawn = key(self.run.training.seed, torch.arange(first, first + count).numpy())
        drawn_B = torch.from_numpy((drawn >> 1).astype("int64"))
        numbers = self.options.numbers
        starts_B1 = (drawn_B % numbers)[:, None]
        steps_B1 = (drawn_B // numbers % numbers)[:, None]
        ids_BS = (starts_B1 + steps_B1 * torch.arange(T + 1)) % numbers
        labels_BT = ids_BS[:, 1:].clone()
        labels_BT[:, 0] = -100
        return Batch(ids_BS[:, :-1], labels_BT, torch.arange(T).expand(count, T))

    def batch(self, state) -> Batch:
        here = self.run.training.batch_size * self.run.accumulation
        return self.records(state.rows_consumed + self.mesh.rank(*DATA) * here, here)

    def loss_sum(self, model, batch, noise_BT=None, cache=None, correct=None) -> Tensor:
        chunk_tokens = self.run.training.loss_chunk_tokens
        return loss_sum(model, batch, chunk_tokens, noise_BT, cache, correct)

    def origins(self, first: int, count: int) -> list[str]:
        return [f"record {number}" for number in range(first, first + count)]

    @torch.no_grad()
    def evaluate(self, state) -> Results:
        part = self.records(UNSEEN, 64).process_part(self.mesh.rank(*DATA), self.mesh.size(*DATA))
        batch = part.to(device_of(state.model))
        nats_BT, is_right_BT = losses(state.model, batch, self.run.training.loss_chunk_tokens)
        reshard(state.model)
        sums = torch.stack([nats_BT.sum(), is_right_BT.sum(), (batch.labels_BT >= 0).sum()])
        nats, right, labels = self.mesh.sum(sums.double().cpu(), *DATA).tolist()
        return {"unseen": {"loss": nats / labels, "accuracy": right / labels, "records": labels}}

    def result_line(self, source: str, numbers: dict[str, float]) -> str:
        return f"counting: {numbers['accuracy']:.0%} of the {source} numbers are right"


TASKS = {"counting": Counting}
