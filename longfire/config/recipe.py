"""A recipe and a command line -> typed sections, strictly: TOML first, then the command line, old
spellings by config/aliases/.

    read_toml(path)          {"training.steps": Given(1000, "recipes/quickstart.toml"), ...}
    read_words(overrides)    {"training.steps": Given("2000", "command line"), ...}
    in_own_names(given)      {"optimizer.lr": ...} for {"lr": ...}: no old spelling is left
    sections(given ...)      {"training": Training(steps=2000, ...), ...}; the later one wins
    model_tables(given ...)  {"hidden_size": 256, "gla": {"num_heads": 4}}: the [model] tables

Whatever is wrong is a SettingsError that names key, value, place and fix. Free of torch.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from longfire.config import aliases
from longfire.config.model_config import TABLES, ModelConfig
from longfire.config.paths import refuse_url
from longfire.config.settings import SECTIONS
from longfire.config.values import as_type, check_interval, nearest
from longfire.errors import SettingsError
from longfire.own_files import parse_toml, problem_of
from longfire.regular_files import read_regular

logger = logging.getLogger(__name__)

MAX_SHOWN = 400  # characters of a value in a message

SETTINGS: dict[str, Field[object]] = {}
for _section, _class in SECTIONS.items():
    for _field in fields(_class):
        SETTINGS[f"{_section}.{_field.name}"] = _field
SHAPE_KEYS = {
    f"model.{field.name}": field for field in fields(ModelConfig) if field.name not in TABLES
}
# Keys of a [[data.sources]] table -> the setting that is the list of all of them
SOURCE_KEYS = {
    "dataset": "data.dataset",
    "name": "data.dataset_name",
    "split": "data.dataset_split",
    "data_dir": "data.data_dir",
    "data_files": "data.data_files",
    "text_field": "data.text_field",
    "record_format": "data.record_format",
    "share": "data.data_probs",
}
# Names of settings in nanoGPT, transformers and torchtitan, without their section -> ours
OTHER_NAMES = {
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
    **dict.fromkeys(("state_dtype", "mu_dtype", "bf16_momentum"), "optimizer.momentum_dtype"),
    **dict.fromkeys(("momentum", "nesterov"), "optimizer.options"),
    "save_top_k": "checkpoint.keep_best_k",
    **dict.fromkeys(("out_dir", "output_dir"), "job.dump_folder"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "eval.interval"),
    "save_steps": "checkpoint.interval",
}


class Given(NamedTuple):
    """A value as someone wrote it, and where; on the command line every value is text."""

    value: object
    where: str


COMMAND_LINE = "command line"


def read_toml(path: Path) -> dict[str, Given]:
    """The settings of a recipe by dotted key. Raises SettingsError naming file and line."""
    try:
        recipe = parse_toml(read_regular(path))
    except FileNotFoundError as e:
        raise SettingsError(
            f"{path}: no such recipe; `longfire init` writes one to start from"
        ) from e
    except (OSError, ValueError) as e:
        raise SettingsError(f"{path}: {problem_of(e)}{hint_of_toml(e)}") from e
    for section in SECTIONS:
        if isinstance(recipe.get(section), list) and is_table(recipe[section]):
            raise SettingsError(
                f"{path}: [[{section}]] is a list of tables: write [{section}], once"
            )
    tables: object = None
    data = recipe.get("data")
    if isinstance(data, dict):
        tables = data.pop("sources", None)
    given = {key: Given(value, str(path)) for key, value in flat(recipe)}
    if tables is not None:
        for key, value in source_lists(tables, str(path)).items():
            if key in given:
                raise SettingsError(
                    f"{path}: {key} and [[data.sources]] mean the same; keep one of them"
                )
            given[key] = Given(value, f"{path}, [[data.sources]]")
    return given


def hint_of_toml(error: Exception) -> str:
    """The most frequent cause of an error of TOML whose own message does not name it."""
    if "Invalid value" in str(error):
        return " (text needs quotes, true and false are lower case)"
    if "Cannot overwrite a value" in str(error) or "Cannot declare" in str(error):
        return " (a key or a [section] stands twice)"
    return ""


def flat(table: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Nested tables as dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
            continue
        is_empty_section = isinstance(value, dict) and not prefix and key in SECTIONS
        if not is_empty_section:
            yield f"{prefix}{key}", value


def source_lists(tables: object, where: str) -> dict[str, list[object]]:
    """[[data.sources]], a table for each source, as the lists that the settings are."""
    has_tables = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if not isinstance(tables, list) or not tables or not has_tables:
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
    lists: dict[str, list[object]] = {}
    for key, setting in SOURCE_KEYS.items():
        if any(key in table for table in tables):
            lists[setting] = [table.get(key, "") for table in tables]
    if "data.data_probs" in lists and not all("share" in table for table in tables):
        raise SettingsError(
            f"{where}: some [[data.sources]] have a `share` and some have none; give it in all "
            "or in none"
        )
    return lists


def read_words(overrides: Mapping[str, str]) -> dict[str, Given]:
    """The settings of the command line."""
    return {key: Given(value, COMMAND_LINE) for key, value in overrides.items()}


def sections(
    *givens: Mapping[str, Given],
) -> dict[str, Any]:
    """The typed sections of a run; a later mapping wins over an earlier one, and what none names
    has its default. Old spellings are translated as by `in_own_names`. Raises SettingsError.
    """
    return sections_of_own_names(*map(in_own_names, givens))


def sections_of_own_names(*givens: Mapping[str, Given]) -> dict[str, Any]:
    """The same of settings that have our keys already."""
    values: dict[str, object] = {}
    for given in givens:
        for key, (value, where) in given.items():
            if not is_model_key(key, value):
                values[key] = typed(key, value, where)
    typed_sections: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        given_here: dict[str, object] = {}
        for key, value in values.items():
            if key.startswith(f"{section}."):
                given_here[key.removeprefix(f"{section}.")] = value
        typed_sections[section] = cls(**given_here)
    return typed_sections


def is_model_key(spelling: str, value: object = "") -> bool:
    """Whether this is a key of the model itself: model.hidden_size, model.gla.num_heads, or a whole
    table model.gla."""
    if spelling in SETTINGS or spelling in aliases.ALIASES or not spelling.startswith("model."):
        return False
    _, table, *keys = spelling.split(".")
    in_table = len(keys) == 1 and table and keys[0] and f"model.{table}" not in SETTINGS
    return bool(in_table) or spelling in SHAPE_KEYS or is_table(value)


def is_table(value: object) -> bool:
    """Whether TOML has a table here, or, where one was meant, a list of tables."""
    if isinstance(value, list):
        return any(isinstance(entry, dict) for entry in value)
    return isinstance(value, dict)


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
                if where == COMMAND_LINE:
                    value = toml_value(str(value))
                tables.setdefault(table, {})[key[0]] = value
            elif value:
                tables[table] = value  # a list of tables, which is refused with the mixer's name
            else:
                tables.setdefault(table, {})
    return tables


def toml_value(text: str) -> object:
    """A value of the command line whose type is not known yet: as TOML reads it, else the text
    itself."""
    try:
        read = parse_toml(f"value = {text}")
    except ValueError:
        return {"True": True, "False": False}.get(text, text)
    if len(read) == 1:
        return read["value"]
    return text


def in_own_names(
    givens: Mapping[str, Given], all_places: Mapping[str, Given] = {}
) -> dict[str, Given]:
    """The same settings by our keys. What an old spelling means is logged.

    all_places: the settings of recipe and command line together, which decide what some old
    spellings mean; of these alone if empty.

    Raises SettingsError for a spelling that is unknown, with the nearest name, or refused, with the
    reason, and for two spellings that mean the same key.
    """
    own: dict[str, Given] = {}
    spelled: dict[str, str] = {}
    texts = texts_of(all_places or givens)
    for spelling, given in givens.items():
        value, where = given
        if is_model_key(spelling, value):
            meaning: Mapping[str, object] = {spelling: value}
        elif spelling in SETTINGS or spelling in aliases.ALIASES:
            meaning, message = aliases.translate(spelling, value, where, texts)
            if message:
                logger.info(message)
        else:
            raise SettingsError(unknown(spelling, where))
        for key, translated in meaning.items():
            if key in spelled:
                raise SettingsError(
                    f"{where}: {spelled[key]} and {spelling} both mean {key}; keep one of them"
                )
            spelled[key] = spelling
            own[key] = Given(translated, where)
    return own


def both_in_own_names(
    toml: Mapping[str, Given], command_line: Mapping[str, Given]
) -> tuple[dict[str, Given], dict[str, Given]]:
    """The settings of a recipe and those of the command line by our keys. Old spellings of one
    place mean what they mean beside those of the other one; an old spelling in both places is
    taken, and logged, as the command line has it. Raises SettingsError as `in_own_names` does."""
    kept: dict[str, Given] = {}
    for spelling, given in toml.items():
        if spelling not in command_line or spelling not in aliases.ALIASES:
            kept[spelling] = given
    own_toml = in_own_names(kept, {**toml, **command_line})
    return own_toml, in_own_names(command_line, {**toml, **own_toml, **command_line})


def texts_of(givens: Mapping[str, Given]) -> dict[str, str]:
    """The values by spelling, as the command line would have them."""
    return {spelling: aliases.as_text(given.value) for spelling, given in givens.items()}


def unknown(spelling: str, where: str) -> str:
    """The message for a key that does not exist: its section if that is what is wrong, else the
    nearest key."""
    section, _, leaf = spelling.rpartition(".")
    if section.startswith("model.") and section.count(".") > 1:
        return (
            f"{where}: unknown setting {spelling!r}: the table of a mixer, as [model.attention], "
            "has no table in it"
        )
    known = [*SETTINGS, *SHAPE_KEYS]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    if same_leaf:
        near = get_close_matches(spelling, same_leaf, 1, cutoff=0) or same_leaf
        return f"{where}: unknown setting {spelling!r} (did you mean {near[0]!r}?)"
    if leaf in OTHER_NAMES:
        ours = OTHER_NAMES[leaf]
        example = f"; MIXER is a name in layer_types, as in {ours.replace('MIXER', 'attention')}"
        return (
            f"{where}: unknown setting {spelling!r} (did you mean "
            f"{ours!r}?{example if 'MIXER' in ours else ''})"
        )
    if section in SECTIONS:
        names = [key.partition(".")[2] for key in known if key.startswith(f"{section}.")]
        hint = nearest(leaf, names, f"{section}.")
    else:
        hint = "" if section else nearest_without_section(leaf)
        hint = hint or nearest(spelling, [*known, *aliases.ALIASES])
        if not hint and section:
            hint = nearest(section, SECTIONS) + f"; the sections are {', '.join(SECTIONS)}"
    if not hint:
        hint = "; `longfire train --help all` lists them all"
    return f"{where}: unknown setting {spelling!r}{hint}"


def nearest_without_section(name: str) -> str:
    """A hint with the setting, key of the model or old spelling whose name without its section, or
    whose name elsewhere, is most like this one; empty where none is."""
    meant = dict(OTHER_NAMES)
    for spelling in aliases.ALIASES:
        if "." not in spelling:
            meant[spelling] = spelling
    for key in (*SETTINGS, *SHAPE_KEYS):
        meant.setdefault(key.rpartition(".")[2], key)
    near = get_close_matches(name, meant, 1, cutoff=0.75)
    if near:
        ours = meant[near[0]].replace("MIXER", "attention")
        return f" (did you mean {ours!r}?)"
    return ""


def shown(value: object) -> str:
    """The value as Python writes it, its beginning and end where that is long."""
    text = repr(value)
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[: MAX_SHOWN // 2]}...{text[-MAX_SHOWN // 2 :]}"


def typed_as(kind: object, key: str, value: object, where: str, interval: str = "") -> object:
    """The value of a key as this type. Raises SettingsError naming key, value, place and what is
    wanted."""
    try:
        value = as_type(kind, value, text=where == COMMAND_LINE)
        check_interval(value, interval)
    except ValueError as error:
        raise SettingsError(f"{where}: {key} = {shown(value)} {error}") from error
    return value


def typed(key: str, value: object, where: str) -> object:
    """The value of a setting as its type, inside its interval. Raises SettingsError naming key,
    value, place and fix."""
    field = SETTINGS[key]
    value = typed_as(field.type, key, value, where, field.metadata["within"])
    refuse_urls(field, value, f"{where}: {key}")
    return value


def refuse_urls(field: Field[object], value: object, setting: str) -> None:
    """Raises SettingsError for a URL in a setting or option that is text, or a list of texts,
    unless it is prose."""
    if field.metadata["is_prose"]:
        return
    texts = value if isinstance(value, tuple) else (value,)
    for text in texts:
        if isinstance(text, str):
            refuse_url(text, setting)
