"""What commands are told besides a run's settings: frozen dataclasses that check themselves; free of torch for an instant --help."""

from dataclasses import dataclass, fields

from longfire.errors import SettingsError
from longfire.recipe import as_type, check_interval
from longfire.settings import NATURAL, POSITIVE, SHARE, setting


@dataclass(frozen=True)
class Checked:
    """Options whose values are of their types and in their intervals, wherever they come from."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, as_type(field.type, value, text=False))
                check_interval(getattr(self, field.name), field.metadata["within"])
            except ValueError as e:
                raise SettingsError(f"{field.name} = {value!r} {e}") from e


@dataclass(frozen=True)
class Sampling(Checked):
    """How the next token is chosen when text is generated. The same seed gives the same text."""

    max_new_tokens: int = setting(128, "at most so many tokens", POSITIVE)
    temperature: float = setting(0.8, "0: always the likeliest", NATURAL)
    top_k: int = setting(50, "of the K likeliest; 0: of all", NATURAL)
    top_p: float = setting(1.0, "of the fewest likeliest that sum to this probability", "(0, 1]")
    min_p: float = setting(0.0, "only what has at least this share of the likeliest's probability", SHARE)
    repetition_penalty: float = setting(
        1.0, "divides the positive logits of words that were there before, multiplies their negative ones", "(0, inf)"
    )
    seed: int = setting(42, "the same seed, the same text", "[0, 18446744073709551615]")
    stop: tuple[str, ...] = setting((), "end before this text; may be repeated")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise SettingsError("stop = '' must be texts that are not empty")
