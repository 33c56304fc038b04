"""Options of commands beside the settings of a run: frozen dataclasses that check themselves; free
of torch for an instant --help."""

from dataclasses import dataclass, fields

from longfire.config.settings import NATURAL, POSITIVE, SHARE, setting
from longfire.config.values import as_type, check_interval
from longfire.errors import SettingsError


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
    min_p: float = setting(
        0.0, "only what has at least this share of the likeliest's probability", SHARE
    )
    repetition_penalty: float = setting(
        1.0,
        "divides the positive logits of words that were there before, multiplies their negative "
        "ones",
        "(0, inf)",
    )
    seed: int = setting(42, "the same seed, the same text", "[0, 18446744073709551615]")
    stop: tuple[str, ...] = setting((), "end before this text; may be repeated", is_prose=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise SettingsError("stop = '' must be texts that are not empty")


@dataclass(frozen=True)
class Scoring(Checked):
    """What `longfire eval` measures, and where the numbers go."""

    data: tuple[str, ...] = setting(
        (),
        "evaluate on all documents (of a classifier: records) of these, comma-separated, as "
        "data.dataset takes them; if empty, the validation documents of the run",
    )
    text_field: str = setting(
        "", "field of --data that holds the text; `text`, else `content`, if empty"
    )
    tokens: int = setting(
        0, "tokens of each source at most; 0: eval.tokens of the run, all of --data", NATURAL
    )
    seq_len: int = setting(
        0,
        "tokens of a sequence; 0: those that the run had at that step, else 2048 or the model's "
        "limit if less",
        NATURAL,
    )
    tasks: tuple[str, ...] = setting((), "tasks of lm-eval instead (extra `eval`), comma-separated")
    include_path: str = setting("", "folder of your own tasks for lm-eval (YAML)")
    limit: int = setting(0, "only so many documents of each task; 0: all", NATURAL)
    num_fewshot: int = setting(
        -1, "examples before each question; -1: as the task says", "[-1, inf)"
    )
    allow_download: bool = setting(
        False, "let tasks fetch data from the hub; without it only the local part is used"
    )
    needle: bool = setting(
        False,
        "measure instead whether a sentence hidden in text is found again (--data, else what "
        "the validation documents of the run, or `embedded`)",
    )
    lengths: tuple[int, ...] = setting((512, 1024), "tokens of text that hide a needle")
    depths: tuple[float, ...] = setting(
        (0.0, 0.5, 1.0), "where in them it is hidden: 0 the beginning, 1 the end"
    )
    needles: int = setting(4, "needles for each length and depth", POSITIVE)
    batch_size: int = setting(8, "sequences that go through the model together", POSITIVE)
    predict: tuple[str, ...] = setting(
        (), "of a classifier: name the classes of these files (images, or texts), comma-separated"
    )
    json: str = setting("", "write the numbers to this file")
    plot: str = setting("", "draw them into this file: .png, .svg or .html")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needle and self.tasks:
            raise SettingsError("--needle and --tasks are two evaluations: ask for one of them")
        if self.needle and not (
            self.lengths
            and self.depths
            and min(self.lengths) > 0
            and all(0 <= d <= 1 for d in self.depths)
        ):
            raise SettingsError(
                "--lengths must be positive and --depths lie in [0, 1], and both must name "
                "something"
            )
