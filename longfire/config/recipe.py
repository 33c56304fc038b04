"""A recipe and a command line -> typed sections, strictly: TOML first, then the command line, old
spellings by config/aliases/.

    read_toml(path)          {"training.steps": Given(1000, "recipes/x.toml"), ...}
    read_words(overrides)    {"training.steps": Given("2000", "command line"), ...}
    sections(given ...)      {"training": Training(steps=2000, ...), ...}; the later one wins
    model_tables(given ...)  {"hidden_size": 256, "gla": {"num_heads": 4}}: the model, where a recipe holds it itself

Whatever is wrong is a SettingsError that names key, value, place and fix. Free of torch.
"""

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from longfire.config import aliases
from longfire.config.model_config import ModelConfig
from longfire.config.paths import refuse_url
from longfire.config.settings import SECTIONS
from longfire.errors import SettingsError

SETTINGS = {
    f"{section}.{field.name}": field for section, cls in SECTIONS.items() for field in fields(cls)
}
SHAPE_KEYS = {
    f"model.{field.name}": field for field in fields(ModelConfig) if field.name != "mixers"
}
SOURCE_KEYS = {  # of a [[data.sources]] table -> the list that the setting of all sources is
    "dataset": "data.dataset",
    "name": "data.dataset_name",
    "split": "data.dataset_split",
    "data_dir": "data.data_dir",
    "data_files": "data.data_files",
    "text_field": "data.text_field",
    "share": "data.data_probs",
}
OTHER_NAMES = {  # what nanoGPT, transformers and torchtitan call a setting, by the last part of its name -> ours
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), "model.num_hidden_layers"),
    **dict.fromkeys(("n_embd", "d_model", "dim", "hidden_dim"), "model.hidden_size"),
    **dict.fromkeys(
        ("n_head", "n_heads", "num_attention_heads", "num_heads"), "model.MIXER.num_heads"
    ),
    **dict.fromkeys(
        ("n_kv_heads", "num_key_value_heads", "num_kv_heads"), "model.MIXER.num_kv_heads"
    ),
    "head_dim": "model.MIXER.head_dim",
    "qk_norm": "model.MIXER.qk_norm",
    **dict.fromkeys(("d_ff", "ffn_dim", "n_inner"), "model.intermediate_size"),
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation", "activation_function"), "model.mlp"
    ),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), "model.norm_eps"),
    **dict.fromkeys(("softcap", "logit_softcap"), "model.final_logit_softcapping"),
    **dict.fromkeys(("model_type", "architectures"), "model.config"),
    **dict.fromkeys(("block_size", "max_seq_len", "sequence_length"), "training.seq_len"),
    **dict.fromkeys(("max_iters", "max_steps", "num_iterations"), "training.steps"),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "micro_batch_size",
            "device_batch_size",
            "local_batch_size",
        ),
        "training.batch_size",
    ),
    "learning_rate": "optimizer.lr",
    **dict.fromkeys(("warmup_iters", "num_warmup_steps"), "lr_scheduler.warmup_steps"),
    "min_lr": "lr_scheduler.min_lr_ratio",
    **dict.fromkeys(("out_dir", "output_dir"), "job.dump_folder"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "eval.interval"),
    "save_steps": "checkpoint.interval",
}
TRUTH = {
    "true": True,
    "on": True,
    "yes": True,
    "1": True,
    "false": False,
    "off": False,
    "no": False,
    "0": False,
}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Given(NamedTuple):
    """A value as someone wrote it, and where; on the command line every value is text."""

    value: Any
    where: str


COMMAND_LINE = "command line"


def read_toml(path: Path) -> dict[str, Given]:
    """The settings of a recipe by dotted key. Raises SettingsError naming file and line."""
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise SettingsError(
            f"{path}: no such recipe; `longfire init` writes one to start from"
        ) from e
    except (OSError, ValueError) as e:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise SettingsError(f"{path}: not readable as TOML: {e}{hint_of_toml(e)}") from e
    for section in SECTIONS:
        if isinstance(recipe.get(section), list) and any(
            isinstance(entry, dict) for entry in recipe[section]
        ):
            raise SettingsError(
                f"{path}: [[{section}]] is a list of tables: write [{section}], once"
            )
    if isinstance(recipe.get("data"), dict):
        tables = recipe.get("data", {}).pop("sources", None)
    else:
        tables = None
    given = {key: Given(value, str(path)) for key, value in flat(recipe)}
    if tables is not None:
        for key, value in source_lists(tables, str(path)).items():
            if key in given:
                raise SettingsError(
                    f"{path}: {key} and [[data.sources]] say the same thing; keep one of them"
                )
            given[key] = Given(value, f"{path}, [[data.sources]]")
    return given


def hint_of_toml(error: Exception) -> str:
    """What is most often behind an error of TOML whose own message does not say it."""
    if "Invalid value" in str(error):
        return " (text needs quotes, true and false are lower case)"
    if "Cannot overwrite a value" in str(error) or "Cannot declare" in str(error):
        return " (a key or a [section] stands twice)"
    return ""


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested tables as dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif (
            not isinstance(value, dict) or prefix or key not in SECTIONS
        ):  # an empty section says nothing, if it exists
            yield f"{prefix}{key}", value


def source_lists(tables: Any, where: str) -> dict[str, list]:
    """[[data.sources]] tables, one a source, as the parallel lists that the settings are."""
    if (
        not isinstance(tables, list)
        or not tables
        or not all(isinstance(table, dict) for table in tables)
    ):
        raise SettingsError(
            f"{where}: data.sources must be tables: [[data.sources]] with a `dataset` in each"
        )
    for number, table in enumerate(tables, 1):
        place = f"{where}, [[data.sources]] number {number}"
        for key in table:
            if key not in SOURCE_KEYS:
                raise SettingsError(f"{place}: unknown key {key!r}{nearest(key, SOURCE_KEYS)}")
        if "dataset" not in table:
            raise SettingsError(
                f"{place}: `dataset` is missing: name a file, folder, glob or hub dataset"
            )
    used = [key for key in SOURCE_KEYS if any(key in table for table in tables)]
    if "share" in used and not all("share" in table for table in tables):
        raise SettingsError(
            f"{where}: some [[data.sources]] have a `share` and some have none; give it in all or in none"
        )
    return {SOURCE_KEYS[key]: [table.get(key, "") for table in tables] for key in used}


def read_words(overrides: Mapping[str, str]) -> dict[str, Given]:
    """What the command line says."""
    return {key: Given(value, COMMAND_LINE) for key, value in overrides.items()}


def sections(*givens: Mapping[str, Given], note: Callable[[str], None]) -> dict[str, Any]:
    """The typed sections of a run; a later mapping wins over an earlier one, defaults fill the
    rest.

    Raises SettingsError; tells `note` of every old spelling once.
    """
    values: dict[str, Any] = {}
    for given in givens:
        spelled: dict[str, str] = {}
        for spelling, (value, where) in given.items():
            if is_model_key(spelling, value):
                continue
            for key, translated in renamed(spelling, value, where, note).items():
                if key in spelled and spelled[key] != spelling:
                    raise SettingsError(
                        f"{where}: {spelled[key]} and {spelling} both mean {key}; keep one of them"
                    )
                spelled[key] = spelling
                values[key] = typed(key, translated, where)
    found: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        found[section] = cls(
            **{
                f.name: values[f"{section}.{f.name}"]
                for f in fields(cls)
                if f"{section}.{f.name}" in values
            }
        )
    return found


def is_model_key(spelling: str, value: Any = "") -> bool:
    """Whether this is a key of the model itself: model.hidden_size, model.gla.num_heads, or a whole
    table model.gla."""
    if spelling in SETTINGS or spelling in aliases.ALIASES or not spelling.startswith("model."):
        return False
    _, table, *keys = spelling.split(".")
    in_table = len(keys) == 1 and table and keys[0] and f"model.{table}" not in SETTINGS
    return bool(in_table) or spelling in SHAPE_KEYS or is_table(value)


def is_table(value: Any) -> bool:
    """Whether TOML wrote a table, or, where one was meant, a list of tables."""
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    )


def is_flag_of_model(spelling: str) -> bool:
    """Whether a key of the model is true or false, as far as that is known without the mixers."""
    return spelling in SHAPE_KEYS and SHAPE_KEYS[spelling].type is bool


def model_tables(*givens: Mapping[str, Given]) -> dict[str, Any]:
    """The model's keys as a config.json has them, a table for each mixer; a later mapping wins.

    Raises SettingsError for a value of another type, as far as the keys are known without the
    mixers.
    """
    tables: dict[str, Any] = {}
    for given in givens:
        for spelling, (value, where) in given.items():
            if not is_model_key(spelling, value):
                continue
            _, table, *key = spelling.split(".")
            if spelling in SHAPE_KEYS:
                tables[table] = typed_as(SHAPE_KEYS[spelling].type, spelling, value, where)
            elif key:
                tables.setdefault(table, {})[key[0]] = (
                    value if where != COMMAND_LINE else toml_value(value)
                )
            elif value:
                tables[table] = value  # a list of tables, which is refused with the mixer's name
            else:
                tables.setdefault(table, {})
    return tables


def toml_value(text: str) -> Any:
    """A value of the command line whose type is not known yet: what TOML reads in it, else the text
    itself."""
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False}.get(text, text)
    if len(read) == 1:
        return read["value"]
    return text


def names(givens: Mapping[str, Given], key: str) -> bool:
    """Whether a mapping says this setting, under any spelling."""
    return any(
        key in renamed(spelling, value, where, lambda message: None)
        for spelling, (value, where) in givens.items()
        if not is_model_key(spelling, value)
    )


def renamed(spelling: str, value: Any, where: str, note: Callable[[str], None]) -> dict[str, Any]:
    """What a spelling means in our keys; an unknown one raises SettingsError with the nearest
    name."""
    if spelling not in SETTINGS and spelling not in aliases.ALIASES:
        raise SettingsError(unknown(spelling, where))
    meaning, message = aliases.translate(spelling, value, where)
    if message:
        note(message)
    return meaning


def unknown(spelling: str, where: str) -> str:
    """The message for a key that does not exist: its section if that is what is wrong, else the
    nearest key."""
    section, _, leaf = spelling.rpartition(".")
    if section.startswith("model.") and section.count(".") > 1:
        return f"{where}: unknown setting {spelling!r}: the table of a mixer, as [model.attention], has no table in it"
    known = [*SETTINGS, *SHAPE_KEYS]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    if same_leaf:
        near = get_close_matches(spelling, same_leaf, 1, cutoff=0) or same_leaf
        return f"{where}: unknown setting {spelling!r} (did you mean {near[0]!r}?)"
    if leaf in OTHER_NAMES:
        ours = OTHER_NAMES[leaf]
        example = f"; MIXER is a name in layer_types, as in {ours.replace('MIXER', 'attention')}"
        return f"{where}: unknown setting {spelling!r} (did you mean {ours!r}?{example if 'MIXER' in ours else ''})"
    if section in SECTIONS:
        names = [key.partition(".")[2] for key in known if key.startswith(f"{section}.")]
        hint = nearest(leaf, names, f"{section}.")
    else:
        hint = nearest(spelling, [*known, *aliases.ALIASES])
        if not hint and section:
            hint = nearest(section, SECTIONS) + f"; the sections are {', '.join(SECTIONS)}"
    if not hint:
        hint = "; `longfire train --help all` lists them all"
    return f"{where}: unknown setting {spelling!r}{hint}"


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    near = get_close_matches(word, list(known), 1)
    if near:
        return f" (did you mean {prefix + near[0]!r}?)"
    return ""


def typed(key: str, value: Any, where: str) -> Any:
    """The value as the setting's type, inside its interval. Raises SettingsError naming key, value,
    place and fix."""
    field = SETTINGS[key]
    value = typed_as(field.type, key, value, where, field.metadata["within"])
    refuse_urls(field, value, f"{where}: {key}")
    return value


def refuse_urls(field: Any, value: Any, setting: str) -> None:
    """Raises SettingsError for a URL in a setting or option that is text, or a list of texts,
    unless it is prose."""
    if field.metadata["is_prose"]:
        return
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str):
            refuse_url(text, setting)


def typed_as(kind: Any, key: str, value: Any, where: str, interval: str = "") -> Any:
    """The value of a key as this type. Raises SettingsError naming key, value, place and what is
    wanted."""
    try:
        value = as_type(kind, value, text=where == COMMAND_LINE)
        check_interval(value, interval)
    except ValueError as e:
        raise SettingsError(f"{where}: {key} = {value!r} {e}") from e
    return value


def as_type(kind: Any, value: Any, text: bool) -> Any:
    """Strict: text is read only where the value was given as text. Raises ValueError saying what is
    wanted."""
    if get_origin(kind) is tuple:
        return as_tuple(get_args(kind)[0], value, text)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(
                f"must be one of {', '.join(get_args(kind))}" + nearest(str(value), get_args(kind))
            )
        return value
    if isinstance(kind, UnionType):
        return as_number_or_text(value, text)
    if text and isinstance(value, str) and kind is not str:
        value = from_text(kind, value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        hint = "; write it without quotes" if isinstance(value, str) else ""
        if kind is int and isinstance(value, float) and value.is_integer():
            hint = f"; write {value:.0f}"
        else:
            hint = hint
        raise ValueError(f"must be {KINDS[kind]}{hint}")
    if kind is float and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def as_number_or_text(value: Any, text: bool) -> float | str:
    """A value that may be either: text is a number where it reads as one. Raises ValueError saying
    what is wanted."""
    if not isinstance(value, str):
        return as_type(float, value, text=False)
    try:
        return as_type(float, value, text)
    except ValueError:
        return value


def from_text(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in TRUTH:
            raise ValueError("must be true or false (the bare flag means true)")
        return TRUTH[text.lower()]
    try:
        return kind(text)
    except ValueError:
        try:
            whole = f"; write {float(text):.0f}" if kind is int and float(text).is_integer() else ""
        except ValueError:
            whole = ""
        raise ValueError(f"must be {KINDS[kind]}{whole}") from None


def as_tuple(kind: type, value: Any, text: bool) -> tuple:
    """A TOML array, or text: comma-separated, or written as a TOML array where an entry holds a
    comma."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = tomllib.loads(f"list = {value}")["list"]
            text = False
        except tomllib.TOMLDecodeError as e:
            raise ValueError(f"is not a TOML array: {e}") from e
    elif isinstance(value, str):
        value = value.split(",") if value else []
        text = True
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"must be a list of {KINDS[kind].removeprefix('a ')}s: a TOML array, or comma-separated"
        )
    return tuple(as_type(kind, entry.strip() if text else entry, text) for entry in value)


def check_interval(value: Any, interval: str) -> None:
    """Raises ValueError unless the number lies in an interval written like "[0, 1)"."""
    if not interval:
        return
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        raise ValueError(
            f"must be at least {low:g}"
            if interval.startswith("[") and high == math.inf
            else f"must lie in {interval}"
        )
