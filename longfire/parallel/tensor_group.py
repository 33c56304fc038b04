"""The processes that share each matrix, and the ways between them."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from longfire.block_execution import TensorRegions
from longfire.ops.vocabulary import VocabularyShard
from longfire.parallel.collectives import CollectivePair, add_up, communicate, take_highest


@dataclass(frozen=True)
class TensorGroup:
    """The processes that share each matrix: how many, which one this is, and the ways between
    them."""

    size: int
    rank: int
    group: str
    sequence_parallel: bool

    @property
    def into(self) -> CollectivePair:
        """The way into a region."""
        if self.sequence_parallel:
            return CollectivePair("gather", "scatter", self.group)
        return CollectivePair("same", "sum", self.group)

    @property
    def out(self) -> CollectivePair:
        """The way out of it."""
        if self.sequence_parallel:
            return CollectivePair("scatter", "gather", self.group)
        return CollectivePair("sum", "same", self.group)

    @property
    def within(self) -> CollectivePair:
        """In the middle of a region: what is added up is used by the heads of one process, so its
        gradient is a part too."""
        return CollectivePair("sum", "sum", self.group)

    def range(
        self,
        size: int,
        parts: int = 1,
    ) -> tuple[tuple[int, int], ...]:
        """What of `size` numbers is on this process, in each of so many equal parts."""
        whole = size // parts
        low = whole * self.rank // self.size
        high = whole * (self.rank + 1) // self.size
        ranges: list[tuple[int, int]] = []
        for part in range(parts):
            begin = part * whole
            ranges.append((begin + low, begin + high))
        return tuple(ranges)

    def tokens(self, x_BT: Tensor) -> Tensor:
        """Those of each sequence on this process between regions."""
        return x_BT.chunk(self.size, 1)[self.rank].contiguous()

    def vocabulary(self, total: int) -> VocabularyShard:
        """The rows of the vocabulary on this process, of `total`."""
        (first, _), *_ = self.range(total)
        return VocabularyShard(
            first,
            total,
            partial(add_up, group=self.group),
            partial(take_highest, group=self.group),
            partial(communicate, there="sum", back="same", group=self.group),
            partial(communicate, there="sum", back="sum", group=self.group),
        )

    def regions(self, vocab_size: int) -> TensorRegions:
        """What happens between the regions of a model."""
        there, back, group = self.into
        enter = partial(
            communicate,
            there=there,
            back=back,
            group=group,
        )
        vocabulary = self.vocabulary(vocab_size)
        if not self.sequence_parallel:
            return TensorRegions(enter, vocabulary=vocabulary)
        sum_of_tokens = partial(communicate, there="sum", back="same", group=self.group)
        return TensorRegions(enter, self.tokens, sum_of_tokens, vocabulary)
