"""Text from ids, while they are drawn."""

from longfire.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoders write for bytes that are not yet a character


class Reader:
    """Turns ids into text as they are drawn, in whole characters, up to a stop.

    What may be the beginning of a stop, or of a character, is held back. Each step decodes from the
    last shown piece on, with that piece before it: decoders treat the beginning of a text
    differently.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        stops: tuple[str, ...] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.ended = False
        self.ids = list(prompt[-4:])
        self.shown = len(prompt[-4:])
        self.held = ""

    def push(self, drawn: int) -> str:
        """The text that can be shown after this id; sets `ended` when a stop is complete."""
        self.ids.append(drawn)
        before = self.tokenizer.decode(self.ids[: self.shown])
        text = self.tokenizer.decode(self.ids)
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        newly_shown = len(self.ids) - self.shown
        self.ids = self.ids[self.shown :]
        self.shown = newly_shown
        return self.until_stop(text[len(before) :])

    def rest(self) -> str:
        """The text that was held back, at the end of all ids."""
        if self.ended:
            return ""
        before = self.tokenizer.decode(self.ids[: self.shown])
        text = self.tokenizer.decode(self.ids)
        shown = self.until_stop(text[len(before) :])
        if self.ended:
            return shown
        return shown + self.held

    def until_stop(self, text: str) -> str:
        """Of what is held back and this, what can be shown."""
        self.held += text
        ends: list[int] = []
        begun = 0
        for stop in self.stops:
            if stop in self.held:
                ends.append(self.held.index(stop))
            begun = max(begun, begun_length(self.held, stop))
        if ends:
            self.ended = True
            return self.held[: min(ends)]
        safe = len(self.held) - begun
        shown = self.held[:safe]
        self.held = self.held[safe:]
        return shown


def begun_length(text: str, stop: str) -> int:
    """The number of characters at the end of a text with which a stop may begin."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
