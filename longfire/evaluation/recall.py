"""Whether a model recalls what it has read: pairs of random tokens (MQAR), and a sentence hidden in
real text (a needle in a haystack)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.table import Table

from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokens import TokenStream
from longfire.errors import DataError, SettingsError
from longfire.loss import losses, losses_of
from longfire.mixers.mixer import Sequence
from longfire.model import Model
from longfire.work_progress import WorkProgress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The ids of a text that ends with an answer, and the number of tokens of the answer
Haystack = tuple[list[int], int]
# -log p(answer), and whether greedy decoding would write it
Score = tuple[float, bool]
PLACES = (
    "Lisbon",
    "Nairobi",
    "Oslo",
    "Quito",
    "Hanoi",
    "Cairo",
    "Dublin",
    "Lima",
    "Kyoto",
    "Sofia",
    "Perth",
    "Accra",
)
SENTENCE = "\nThe secret number of {place} is"
ANSWER = " {number}"
END = ".\n"


def mqar(
    sequences: int,
    tokens: int,
    pairs: int,
    vocab_size: int,
    seed: int,
    power: float = 0.01,
) -> Batch:
    """Multi-query associative recall (Arora 2023, "Zoology", section 3 and appendix A): pairs of a
    key and its value, then each key once more, whose label is its value; nothing else has a label.

    Keys are drawn from the lower half of the vocabulary, values from the upper, both without
    repetition. The distance between the pairs and the second occurrence of a key follows a power
    law (a / distance^(1 - a), a = `power`); the other tokens are random. With pairs = 2:

        ids     k1 v1 k2 v2 .. k2 .. .. .. k1 ..
        labels                 v2          v1
    """
    if tokens % 2 or 4 * pairs > tokens or vocab_size // 2 <= pairs:
        raise SettingsError(
            f"MQAR: {pairs} pairs need an even number of at least {4 * pairs} tokens and more "
            f"than {2 * pairs + 1} tokens in the vocabulary, not {tokens} and {vocab_size}"
        )
    chance = np.random.default_rng(seed)
    half = vocab_size // 2
    before = 2 * pairs
    keys = 1 + distinct(chance, sequences, np.ones(half - 1), pairs)
    values = half + distinct(chance, sequences, np.ones(vocab_size - half), pairs)
    spaces = np.arange(1, (tokens - before) // 2 + 1)
    places = before + 2 * distinct(chance, sequences, power * spaces ** (power - 1), pairs)
    ids_BT = chance.integers(vocab_size, size=(sequences, tokens))
    ids_BT[:, 0:before:2] = keys
    ids_BT[:, 1:before:2] = values
    labels_BT = np.full((sequences, tokens), NO_LABEL)
    np.put_along_axis(ids_BT, places, keys, 1)
    np.put_along_axis(labels_BT, places, values, 1)
    positions_BT = torch.arange(tokens).expand(sequences, -1)
    return Batch(torch.from_numpy(ids_BT), torch.from_numpy(labels_BT), positions_BT)


def distinct(
    chance: np.random.Generator,
    sequences: int,
    weights: np.ndarray,
    count: int,
) -> np.ndarray:
    """(sequences, count): different numbers below len(weights) for each sequence, drawn one after
    the other by their weights, as the order of exponential times with these rates."""
    times = chance.exponential(size=(sequences, len(weights))) / weights
    return np.argsort(times, 1)[:, :count]


@torch.no_grad()
def accuracy(
    model: Model,
    batch: Batch,
    chunk_tokens: int = 0,
) -> float:
    """Share of the labels that are the model's most likely token."""
    batch = batch.to(next(model.parameters()).device)
    right_BT = losses(model, batch, chunk_tokens)[1]
    return float(right_BT.sum() / (batch.labels_BT != NO_LABEL).sum())


@dataclass(frozen=True)
class Cell:
    """The needles of one length and depth. Nats are of the whole answer, means over the
    needles."""

    length: int
    depth: float
    needles: int
    nats: float  # -log p(answer), the needle in the text
    nats_without: float  # the same text without it
    repeated: float  # share of answers that greedy decoding would write

    @property
    def gain(self) -> float:
        """The nats by which the needle makes the answer more likely: 0 for a model that does not
        use it."""
        return self.nats_without - self.nats


@dataclass(frozen=True)
class Needle:
    """A needle in a haystack (Kamradt 2023): a sentence with a number is put into real text, at the
    end the sentence begins again.

    Every answer is scored twice, after the text with the needle and after as many tokens of it
    without, so that a model that only guesses digits gains nothing. An answer is repeated when each
    of its tokens is the most likely one after those before it: greedy decoding would write it.
    """

    model: Model
    tokenizer: Tokenizer
    text: TokenStream
    add_bos: bool = False

    def measure(
        self,
        lengths: Iterable[int],
        depths: Iterable[float],
        needles: int,
        batch_size: int,
        seed: int = 0,
    ) -> list[Cell]:
        """A cell for each length (tokens of a sequence, all included) and depth. Raises
        SettingsError and DataError."""
        if self.model.config.learned_positions:
            limit = self.model.config.max_position_embeddings
        else:
            limit = 0
        if limit and max(lengths) > limit:
            raise SettingsError(
                f"--lengths {max(lengths)}: the model has learned {limit} positions; ask for no "
                "more"
            )
        lengths = list(lengths)
        depths = list(depths)
        tokens = 2 * needles * len(depths) * sum(lengths)  # with the needle and without it
        cells: list[Cell] = []
        with WorkProgress("needles", tokens, "tokens") as progress:
            for length in lengths:
                for depth in depths:
                    cells.append(self.cell(length, depth, needles, batch_size, seed, progress))
        return cells

    def cell(
        self,
        length: int,
        depth: float,
        needles: int,
        batch_size: int,
        seed: int,
        progress: WorkProgress,
    ) -> Cell:
        """The needles of one length and depth, `batch_size` sequences at a time."""
        sequences: list[Haystack] = []
        for number in range(needles):
            sequences += self.haystacks(length, depth, number, seed)
        scores: list[Score] = []
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            scores += self.scores(batch)
            progress.add(len(batch) * length)
        nats, repeated = zip(*scores[0::2])
        nats_without, _ = zip(*scores[1::2])
        return Cell(
            length,
            depth,
            needles,
            nats=float(np.mean(nats)),
            nats_without=float(np.mean(nats_without)),
            repeated=float(np.mean(repeated)),
        )

    def haystacks(
        self,
        length: int,
        depth: float,
        number: int,
        seed: int,
    ) -> list[Haystack]:
        """The text with the needle and without it, both with the question and its answer at their
        end. Raises SettingsError or DataError where the needle does not fit."""
        chance = np.random.default_rng([seed, number])
        place = PLACES[number % len(PLACES)]
        secret = int(chance.integers(10**5, 10**6))
        question = self.tokenizer.encode(SENTENCE.format(place=place))
        answer = self.tokenizer.encode(ANSWER.format(number=secret))
        bos: list[int] = []
        if self.add_bos and self.tokenizer.bos_id is not None:
            bos.append(self.tokenizer.bos_id)
        needle = [*question, *answer, *self.tokenizer.encode(END)]
        room = length - len(bos) - len(question) - len(answer)
        if room < 2 * len(needle):
            raise SettingsError(
                f"--lengths {length}: a needle of {len(needle)} tokens cannot hide there; ask "
                "for more"
            )
        if self.text.length < room:
            raise DataError(
                f"{self.text.length:,} tokens of text cannot hide a needle in {length:,}; name "
                "more with --data"
            )
        first = int(chance.integers(self.text.length - room + 1))
        text = self.text.tokens(first, first + room).tolist()
        cut = round(depth * (room - len(needle)))
        with_needle = [*text[:cut], *needle, *text[cut : room - len(needle)]]
        return [
            ([*bos, *with_needle, *question, *answer], len(answer)),
            ([*bos, *text, *question, *answer], len(answer)),
        ]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def scores(self, sequences: list[Haystack]) -> list[Score]:
        """The scores of sequences of one length."""
        device = self.model.embed.weight.device
        texts, answer_sizes = zip(*sequences)
        ids_BT = torch.tensor(texts, device=device)
        positions_T = torch.arange(ids_BT.shape[1] - 1, device=device)
        positions_BT = positions_T.expand(len(sequences), -1)
        hidden_BTD = self.model(ids_BT[:, :-1], Sequence(positions_BT))
        longest = max(answer_sizes)
        labels_BA = ids_BT[:, -longest:].clone()
        for number, answer_tokens in enumerate(answer_sizes):
            labels_BA[number, : longest - answer_tokens] = NO_LABEL
        nats_BA, right_BA = losses_of(self.model, hidden_BTD[:, -longest:], labels_BA)
        right_BA |= labels_BA == NO_LABEL
        return list(zip(nats_BA.sum(1).tolist(), right_BA.all(1).tolist()))


def needle_table(cells: list[Cell]) -> Table:
    """A line for each length, a column for each depth: the nats that the needle is worth, and how
    many answers are repeated."""
    depths = sorted({cell.depth for cell in cells})
    table = Table("tokens")
    for depth in depths:
        table.add_column(f"depth {depth:g}")
    cell_at = {(cell.length, cell.depth): cell for cell in cells}
    for length in sorted({cell.length for cell in cells}):
        texts = [f"{length:,}"]
        for depth in depths:
            cell = cell_at[length, depth]
            texts.append(f"{cell.gain:+.2f}  {cell.repeated:.0%}")
        table.add_row(*texts)
    return table


def draw_needle(cells: list[Cell]) -> "Figure":
    """Two maps of length and depth: nats gained, answers repeated."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.6, 3.4), layout="constrained")
    gain_axes, repeated_axes = drawn.subplots(1, 2)
    gains: dict[tuple[float, int], float] = {}
    repeated: dict[tuple[float, int], float] = {}
    for cell in cells:
        gains[cell.depth, cell.length] = cell.gain
        repeated[cell.depth, cell.length] = cell.repeated
    draw_map(gain_axes, gains, "nats gained", (None, None))
    draw_map(repeated_axes, repeated, "answers repeated", (0, 1))
    return drawn


def draw_map(
    axes: "Axes",
    values: dict[tuple[float, int], float],
    title: str,
    limits: tuple[float | None, float | None],
) -> None:
    """Values by (depth, length) as colours. limits: the values of the first and last colour."""
    depths = sorted({depth for depth, _ in values})
    lengths = sorted({length for _, length in values})
    grid = np.empty((len(depths), len(lengths)))
    for (depth, length), value in values.items():
        grid[depths.index(depth), lengths.index(length)] = value
    low, high = limits
    image = axes.imshow(
        grid,
        aspect="auto",
        cmap="viridis",
        vmin=low,
        vmax=high,
    )
    axes.set(xlabel="tokens", ylabel="depth", title=title)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.figure.colorbar(image, ax=axes)
