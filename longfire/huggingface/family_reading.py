"""A config.json of a family -> the model config that it describes, by the family's table; free of
torch."""

from collections.abc import Mapping
from dataclasses import fields

from longfire.config.model_config import ModelConfig
from longfire.config.model_rules import check_layers
from longfire.config.own_settings import check_type, nearest
from longfire.config.strict import placed
from longfire.errors import SettingsError
from longfire.huggingface.family import Config, Family, Settings, without

# What every PreTrainedConfig may hold, or held, beside the model's config: keys of tools, of other
# heads, of generation.
INERT = (
    "model_type",
    "architectures",
    "_name_or_path",
    "name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "auto_map",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "id2label",
    "label2id",
    "num_labels",
    "_num_labels",
    "problem_type",
    "is_encoder_decoder",
    "is_decoder",
    "chunk_size_feed_forward",
    "task_specific_params",
    "tokenizer_class",
    "torchscript",
    "use_bfloat16",
    "pruned_heads",
    "finetuning_task",
    "prefix",
    "output_past",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "transformers.js_config",
    "unsloth_version",
    "unsloth_fixed",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "num_return_sequences",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
# Keys that mean something in a config of ours. `dropout` is in files of others too, whose classes
# ignore it.
KEYS_OF_OURS = frozenset(f.name for f in fields(ModelConfig)) - {"dropout"}
# Phi-3 and others have this length outside the table of rotary positions, where every class of
# transformers looks first, whether it declares the key or not.
ORIGINAL_LENGTH = "original_max_position_embeddings"
ROPE_TABLE = "rope_parameters"


def read_family_config(
    family: Family,
    config: Config,
    where: str,
    ignored: frozenset[str] = frozenset(),
) -> ModelConfig:
    """The model config that a config.json of this family describes. Raises SettingsError naming a
    key that longfire cannot express.

    ignored: flat names of keys that are not read.
    """
    asked = without(asked_of(family, config, where), ignored)
    settings = family.ours | family.initial
    used = set(family.layers.reads)
    for key in family.keys:
        if key.applies(settings):
            settings[key.ours] = key.read(asked, settings, where)
    for key in family.keys:
        if key.applies(settings):
            used.add(key.theirs)
    plain = {name: value for name, value in settings.items() if "." not in name}
    check_plain(plain, where)
    layer_types, mixers = family.layers.read(asked, settings, family.mixer, where)
    check_rest(without(asked, used), family, config, settings, where)
    return ModelConfig(**plain, layer_types=layer_types, mixers=mixers)


def check_plain(plain: Settings, where: str) -> None:
    """Raises SettingsError for a value of the model that no machine can take."""
    kinds = {field.name: field.type for field in fields(ModelConfig)}
    for name, value in plain.items():
        check_type(f"{where}: {name}", value, kinds[name])
    with placed(where):
        check_layers(plain["num_hidden_layers"])


def asked_of(family: Family, config: Config, where: str) -> Config:
    """Flat name -> value of the keys that say something about the model. Raises SettingsError."""
    asked = flat(without(config, INERT), family, where)
    return without(asked, family.inert)


def idle_rope_keys(family: Family, asked: Config) -> list[str]:
    """Keys of rotary positions that have a value, but are not used by the kind in the config:
    transformers warns and continues.

    Where no kind is named, only the original length is such a key: a factor was meant to scale.
    """
    kind = asked.get(f"{ROPE_TABLE}.rope_type")
    used = set()
    names = []
    for key in family.keys:
        if key.when[:1] == ("attention.rope",) and key.theirs.startswith("rope_"):
            names.append(key.theirs)
            if (kind or "default") in key.when:
                used.add(key.theirs)
    idle = []
    for name in dict.fromkeys(names):
        is_idle = name not in used and asked.get(name) is not None
        if is_idle and (kind or name == f"{ROPE_TABLE}.{ORIGINAL_LENGTH}"):
            idle.append(name)
    return idle


def names_of(family: Family) -> set[str]:
    """Every flat name that the family's table reads, older spellings too."""
    return {
        *family.their_keys(),
        *family.replaced,
        *family.layers.reads,
        *family.older,
    }


def nested_names(family: Family) -> set[str]:
    """Keys of the family whose values are tables."""
    return {name.partition(".")[0] for name in family.their_keys() if "." in name}


def flat(config: Config, family: Family, where: str) -> Config:
    """Their keys, dotted where the table has them nested, in today's spelling. Raises SettingsError
    where two spellings have different values."""
    nested = nested_names(family)
    found: Config = {}
    for name, value in config.items():
        for key, entry in entries_of(name, value, nested, family.older, where).items():
            before = found.get(key)
            if before is not None and entry is not None and before != entry:
                raise SettingsError(
                    f"{where}: {key} is named twice, as {before!r} and as {entry!r}; remove one of "
                    "them"
                )
            if entry is not None or key not in found:
                found[key] = entry
    if ROPE_TABLE in nested and found.get(ORIGINAL_LENGTH) is not None:
        found[f"{ROPE_TABLE}.{ORIGINAL_LENGTH}"] = found.pop(ORIGINAL_LENGTH)
    return found


def entries_of(
    name: str,
    value: object,
    nested: set[str],
    older: Mapping[str, str],
    where: str,
) -> Config:
    """Flat name -> value of one key of a config; several for a table. Raises SettingsError."""
    today = older.get(name, name)
    if today not in nested:
        return {today: value}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{where}: {name} = {value!r} must be a table")
    entries = {}
    for leaf, entry in value.items():
        flat_name = f"{today}.{leaf}"
        entries[older.get(flat_name, flat_name)] = entry
    return entries


def check_rest(
    rest: Config,
    family: Family,
    config: Config,
    settings: Settings,
    where: str,
) -> None:
    """Raises SettingsError for a key that no Key has read, unless its value is what holds anyway. A
    null asks for nothing."""
    model_type = config["model_type"]
    for name, value in rest.items():
        if name in family.replaced and config.get(family.replaced[name]) is not None:
            continue
        allowed = family.fixed.get(name)
        if allowed is None and value is not None:
            raise unknown_key(name, value, family, model_type, settings, where)
        if allowed is not None and value not in allowed:
            raise SettingsError(
                f"{where}: {name} = {value!r}: longfire has {model_type} models with {name} = "
                f"{allowed[0]!r} only"
            )


def unknown_key(
    name: str,
    value: object,
    family: Family,
    model_type: str,
    settings: Settings,
    where: str,
) -> SettingsError:
    """The error for a key that longfire does not have, or not with the other settings."""
    for key in family.keys:
        if key.theirs == name:
            other = key.when[0]
            return SettingsError(
                f"{where}: {name} = {value!r} means nothing with {other} = {settings[other]!r}; "
                "remove it"
            )
    hint = nearest(name, names_of(family))
    if name in KEYS_OF_OURS:
        hint = (
            "; it is a key of longfire's own: write it under [model] of the recipe, beside config"
        )
    return SettingsError(
        f"{where}: {name} = {value!r}: longfire has no such setting for {model_type} models{hint}"
    )
