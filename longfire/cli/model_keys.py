"""The reference page of all keys of a model config, by mixer, from the dataclasses that read them:
`longfire init --model-keys`."""

from collections.abc import Iterable
from dataclasses import MISSING, Field, fields

from longfire.config.aliases import as_text
from longfire.config.model_config import TABLES, ModelConfig
from longfire.mixers import MIXERS
from longfire.mlps.contract import WidthConfig

TYPES: dict[object, str] = {
    int: "whole number",
    float: "number",
    float | None: "number",
    float | str: "number or name",
    str: "text",
    bool: "true or false",
    tuple[str, ...]: "list of names",
    tuple[float, ...]: "list of numbers",
}
HEAD = """# Keys of a model config

Made by `longfire init --model-keys` from the dataclasses that read them; do not edit it by hand.

A model is described in one of three ways; all take the same keys, strictly: an unknown one is an
error that names the nearest.

In a recipe, or over the config that `model.config` names:

```toml
[model]
hidden_size = 320
num_hidden_layers = 8
layer_types = ["gla", "gla", "gla", "attention"]

[model.gla]
num_heads = 5

[model.attention]
num_heads = 5
```

In a `config.json` that `model.config` names (`longfire`'s own; those of Hugging Face families have
the keys of their classes):

```json
{"model_type": "longfire", "hidden_size": 320, "num_hidden_layers": 8,
 "layer_types": ["gla", "gla", "gla", "attention"],
 "gla": {"num_heads": 5}, "attention": {"num_heads": 5}}
```

On the command line, over either:

```
longfire train quickstart --model.num_hidden_layers 8 --model.attention.num_heads 6
```

`mixer:variant` in `layer_types` is the same mixer with a table of its own:
`["attention:local", "attention"]` with `[model."attention:local"]`."""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD, section("The model", config_fields(ModelConfig))]
    parts += [section(f"{name}", config_fields(mixer.Config)) for name, mixer in MIXERS.items()]
    parts.append(section("The MLPs, each by its name", config_fields(WidthConfig)))
    return "\n\n".join(parts) + "\n"


def config_fields(shape: type) -> list[Field[object]]:
    """The keys of a config; the tables of mixers and MLPs have sections of their own."""
    return [field for field in fields(shape) if field.name not in TABLES]


def section(title: str, keys: Iterable[Field[object]]) -> str:
    lines = [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{key.name}` | {type_of(key)} | {default_of(key)} | "
        f"{cell(key.metadata.get('help', ''))} |"
        for key in keys
    ]
    return "\n".join(lines)


def type_of(key: Field[object]) -> str:
    return TYPES[key.type]


def default_of(key: Field[object]) -> str:
    if key.default is MISSING:
        return "required"
    if key.default in (None, ()):
        return "none"
    return f"`{as_text(key.default)}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def without_help() -> list[str]:
    """Keys that do not say what they mean, as `gla.num_heads`."""
    shapes = {"model": ModelConfig, **{name: mixer.Config for name, mixer in MIXERS.items()}}
    return [
        f"{name}.{key.name}"
        for name, shape in shapes.items()
        for key in config_fields(shape)
        if not key.metadata.get("help")
    ]
