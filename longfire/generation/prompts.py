"""`longfire generate`: prompts from the command line, a file or a person at a terminal; text to
stdout, numbers to stderr.

On a terminal the prompt is dim, or with NO_COLOR followed by the sign ‖. A file or a pipe gets
prompt and continuation as they are.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypedDict

from longfire.checkpoint.weights import Opened, open_model
from longfire.config.options import Sampling
from longfire.data.compressed import ERRORS
from longfire.data.lines import read_lines
from longfire.errors import DataError, SettingsError
from longfire.generation.continuation import continuation_of
from longfire.generation.generate import (
    begins_with_bos,
    generate_texts,
    prompt_ids,
    stream_text,
    write,
)
from longfire.generation.steps import Pace
from longfire.launch import no_color
from longfire.messages import visible
from longfire.mixers.cache import Cache
from longfire.ops.rounded_weights import keep_rounded
from longfire.own_files import json_of

# How a terminal shows the prompt; without colours the sign marks its end
DIM = "\033[2m"
NORMAL = "\033[0m"
PROMPT_END = "‖"


def main(
    folder: Path,
    sampling: Sampling,
    prompts: list[str],
    file: Path | None = None,
    interactive: bool = False,
    batch_size: int = 1,
    stats: bool = False,
    step: int = -1,
    plugins: tuple[str, ...] = (),
) -> int:
    """Print the continuation of each prompt by the model in a run folder or a folder of Hugging
    Face weights.

    Without prompts a person at a terminal is asked for them. A single continuation is shown as it
    is drawn, those of a batch when all of it are over. Raises SettingsError or DataError.
    """
    if file:
        prompts = [*prompts, *read_prompts(file)]
    if not prompts and not interactive and not sys.stdin.isatty():
        raise SettingsError(
            "no prompt: give --prompt TEXT, --prompts FILE, or --interactive to be asked for them"
        )
    if batch_size < 1:
        raise SettingsError(f"--batch_size {batch_size}: at least 1")
    opened = open_model(Path(folder), step, plugins=plugins)
    pace = Pace()
    keep_rounded(opened.model, opened.model.compute_dtype)
    if interactive or not prompts:
        if batch_size > 1:
            raise SettingsError(
                f"--batch_size {batch_size} is for prompts that are known beforehand; leave out "
                "--interactive"
            )
        converse(Conversation(opened, sampling, pace), prompts)
    elif batch_size > 1:
        texts = generate_texts(
            opened.model,
            opened.tokenizer,
            prompts,
            sampling,
            begins_with_bos(opened),
            batch_size,
            pace,
        )
        for prompt, text in zip(prompts, texts):
            show([shown(prompt), printable(text), "\n"])
    else:
        for index, prompt in enumerate(prompts):
            show([shown(prompt)])
            add_bos = begins_with_bos(opened)
            pieces = stream_text(
                opened.model,
                opened.tokenizer,
                prompt,
                sampling,
                add_bos,
                index,
                pace,
            )
            show(map(printable, pieces))
            show(["\n"])
    if stats:
        print(f"stats: {pace}", file=sys.stderr)
    return 0


def shown(prompt: str) -> str:
    """The prompt as it is shown before its continuation; on a terminal it is marked as not written
    by the model."""
    if not sys.stdout.isatty():
        return prompt
    if no_color():
        return f"{prompt}{PROMPT_END}"
    return f"{DIM}{prompt}{NORMAL}"


def printable(text: str) -> str:
    """What the model has written; on a terminal control characters are escapes, since they could
    command it."""
    if not sys.stdout.isatty():
        return text
    return visible(text)


def show(texts: Iterable[str]) -> None:
    """Write texts to stdout, each at once."""
    for text in texts:
        sys.stdout.write(text)
        sys.stdout.flush()


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: one in each line, of a .jsonl its field `prompt`. Empty lines are
    skipped. Raises DataError naming file and line."""
    lines = []
    for number, line in lines_in(file):
        if line.strip():
            lines.append((number, line))
    if not lines:
        raise DataError(f"{file}: no prompt in it; write one a line")
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [prompt_of(line, f"{file}:{number}") for number, line in lines]


def lines_in(file: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file of prompts. Raises DataError naming file and line."""
    try:
        for number, line, problem in read_lines(file):
            if problem:
                raise DataError(f"{file}:{number}: {problem}; prompts are UTF-8")
            yield number, line
    except ERRORS as e:
        raise DataError(
            f"{file}: prompts cannot be read from it ({e}); name a text file, or a .jsonl with "
            "`prompt`"
        ) from e


class PromptLine(TypedDict):
    """A line of a .jsonl of prompts."""

    prompt: str


def prompt_of(line: str, where: str) -> str:
    try:
        return json_of(line, PromptLine)["prompt"]
    except ValueError as e:
        raise DataError(
            f'{where}: not a JSON object with a `prompt` ({e}); write {{"prompt": "..."}}'
        ) from e


class Conversation:
    """A text that a person and the model write by turns. What the layers keep stays from turn to
    turn, so each token passes through the model once."""

    def __init__(
        self,
        opened: Opened,
        sampling: Sampling,
        pace: Pace,
    ) -> None:
        self.model = opened.model
        self.tokenizer = opened.tokenizer
        self.sampling = sampling
        self.pace = pace
        self.add_bos = begins_with_bos(opened)
        self.ids: list[int] = []
        self.cache = Cache()
        self.turns = 0

    def reply(self, text: str) -> Iterator[str]:
        """What the model writes after this text, in pieces; the text begins a new line, but for the
        first."""
        begun = bool(self.ids)
        self.ids += (
            self.tokenizer.encode(f"\n{text}")
            if begun
            else prompt_ids(self.tokenizer, text, self.add_bos)
        )
        row = continuation_of(
            self.model,
            self.tokenizer,
            self.ids,
            self.sampling,
            self.turns,
        )
        self.turns += 1
        for _, piece in write(self.model, [row], self.cache, self.pace):
            yield piece
        self.ids = row.ids


def converse(conversation: Conversation, first: list[str]) -> None:
    """Ask for lines until they end (Ctrl-D), and show what the model writes after each."""
    asked = sys.stdin.isatty()
    if asked:
        print(
            "Each line is continued; what was said before stays in mind. Ctrl-D ends.",
            file=sys.stderr,
        )
    for line in chain(first, lines(asked)):
        show(map(printable, conversation.reply(line)))
        show(["\n"])


def lines(asked: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if asked else "")
        except EOFError:
            return
