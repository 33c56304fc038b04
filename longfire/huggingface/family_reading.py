"""A config.json of a family -> the shape that it describes, by the family's table; free of torch."""

from dataclasses import fields
from typing import Any

from longfire.config.model_config import ModelConfig, nearest
from longfire.errors import SettingsError
from longfire.huggingface.family import Family, Settings

# What every PreTrainedConfig may hold, or held, beside the model's config: of tools, of heads that
# are none, of generation.
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
# Keys that mean something in a config of ours. `dropout` stands in files of others too, whose
# classes ignore it.
KEYS_OF_OURS = frozenset(f.name for f in fields(ModelConfig)) - {"dropout"}
# Phi-3 and others have this length outside the table of rotary positions, where every class of
# transformers looks first, whether it declares the key or not.
ORIGINAL_LENGTH = "original_max_position_embeddings"


def read_family_config(
    family: Family, config: dict[str, Any], where: str, ignored: frozenset[str] = frozenset()
) -> ModelConfig:
    """The shape that a config.json of this family describes. Raises SettingsError naming a key that
    we cannot express.

    ignored: flat names of keys that are passed over.
    """
    asked = {
        name: value
        for name, value in asked_of(family, config, where).items()
        if name not in ignored
    }
    settings = family.ours | family.begins
    for key in family.keys:
        if key.applies(settings):
            settings[key.ours] = key.read(asked, settings, where)
    layer_types, mixers = family.layers.read(asked, settings, family, where)
    used = {key.theirs for key in family.keys if key.applies(settings)} | set(family.layers.reads)
    check_rest(
        {name: value for name, value in asked.items() if name not in used},
        family,
        config,
        settings,
        where,
    )
    plain = {name: value for name, value in settings.items() if "." not in name}
    return ModelConfig(**plain, layer_types=layer_types, mixers=mixers)


def asked_of(family: Family, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Flat name -> value of the keys that say something of the model. Raises SettingsError."""
    asked = flat({k: v for k, v in config.items() if k not in INERT}, family, where)
    return {k: v for k, v in asked.items() if k not in family.inert}


def idle_rope_keys(family: Family, asked: dict[str, Any]) -> list[str]:
    """Keys of rotary positions that have a value and that the kind in the config does not use:
    transformers warns and goes on.

    Where no kind is named, only the original length is such a key: a factor was meant to scale.
    """
    kind = asked.get("rope_parameters.rope_type")
    original = "rope_parameters.original_max_position_embeddings"
    keys = [
        key
        for key in family.keys
        if key.when[:1] == ("attention.rope",) and key.theirs.startswith("rope_")
    ]
    used = {key.theirs for key in keys if (kind or "default") in key.when}
    unused = dict.fromkeys(key.theirs for key in keys if key.theirs not in used)
    return [name for name in unused if asked.get(name) is not None and (kind or name == original)]


def names_of(family: Family) -> set[str]:
    """Every flat name that the family's table reads, older spellings too."""
    return {
        *(key.theirs for key in family.keys),
        *family.fixed,
        *family.replaced,
        *family.layers.reads,
        *family.older,
    }


def flat(config: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Their keys, dotted where the table has them nested, in today's spelling. Raises SettingsError
    where both say something else."""
    nested = {
        name.partition(".")[0]
        for name in (*(key.theirs for key in family.keys), *family.fixed)
        if "." in name
    }
    out: dict[str, Any] = {}
    for name, value in config.items():
        today = family.older.get(name, name)
        if today in nested:
            if value is not None and not isinstance(value, dict):
                raise SettingsError(f"{where}: {name} = {value!r} must be a table")
            said = {f"{today}.{inner_name}": v for inner_name, v in (value or {}).items()}
            said = {family.older.get(inner_name, inner_name): v for inner_name, v in said.items()}
        else:
            said = {today: value}
        for key, value in said.items():
            if out.get(key) is not None and value is not None and out[key] != value:
                raise SettingsError(
                    f"{where}: {key} is said twice, as {out[key]!r} and as {value!r}; remove one of them"
                )
            out[key] = out[key] if value is None and key in out else value
    if "rope_parameters" in nested and out.get(ORIGINAL_LENGTH) is not None:
        out[f"rope_parameters.{ORIGINAL_LENGTH}"] = out.pop(ORIGINAL_LENGTH)
    return out


def check_rest(
    asked: dict[str, Any], family: Family, config: dict[str, Any], settings: Settings, where: str
) -> None:
    """Raises SettingsError for a key that no row of the table has read, unless it says what holds
    anyway. A null asks for nothing."""
    model_type = config["model_type"]
    for name, value in asked.items():
        allowed = family.fixed.get(name)
        if name in family.replaced and config.get(family.replaced[name]) is not None:
            continue
        if allowed is None and value is not None:
            idle = [key for key in family.keys if key.theirs == name]
            if idle:
                other = idle[0].when[0]
                raise SettingsError(
                    f"{where}: {name} = {value!r} means nothing with {other} = {settings[other]!r}; remove it"
                )
            hint = nearest(name, names_of(family))
            if name in KEYS_OF_OURS:
                hint = "; it is a key of longfire's own: write it under [model] of the recipe, beside config"
            raise SettingsError(
                f"{where}: {name} = {value!r}: longfire has no such setting for {model_type} models{hint}"
            )
        if allowed is not None and value not in allowed:
            raise SettingsError(
                f"{where}: {name} = {value!r}: longfire has {model_type} models with {name} = {allowed[0]!r} only"
            )
