"""The model card of an export: what the model is, how it came to be, how to load it, what was
checked."""

import inspect
import re
from pathlib import Path
from typing import Any

from longfire.config.model_config import mixer_of
from longfire.huggingface.check import Check
from longfire.huggingface.families import FAMILIES
from longfire.huggingface.own_config import LONGFIRE, is_own_export
from longfire.mixers import MIXERS

# The folders of a path of this machine in a text: /data/me/x.txt, ~/x, C:\me\x; not https://x/y,
# owner/set or and/or. The card is for others: where things lay on the machine that trained says
# nothing to them, and more than its owner may want.
POSIX, WINDOWS = r"~?/(?:[^\s/'\",;()\]]+/)*", r"[A-Za-z]:\\(?:[^\s\\'\",;]+\\)*"
FOLDERS_IN_TEXT = re.compile(rf"(?<![\w.:/~\\])(?:{POSIX}|{WINDOWS})(?=[^\s/\\])")
LOCAL_KEYS = (
    "_name_or_path",
    "name_or_path",
)  # of a config of transformers: a folder of this machine

USE = """```python
{imports}
model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def model_card(
    name: str, config: dict[str, Any], parameters: int, facts: dict[str, Any], check: Check
) -> str:
    """README.md of an export, with the front matter that the hub reads."""
    own = is_own_export(config)
    family, architecture = (
        LONGFIRE if own else FAMILIES.get(config["model_type"]),
        config["architectures"][0],
    )
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if family and family.package != "transformers":
        imports = f"import {family.package}  # registers {architecture}\n{imports}"
    if files := files_of_mixers(config) if own else ():
        imports += f"\nfrom longfire.plugins import load_plugins\nload_plugins({files!r})  # where its mixers are defined"
    by_us = "Or `longfire generate FOLDER --prompt TEXT`" + (
        "." if own else ", which needs neither of them."
    )
    shown = {key: value for key, value in facts.items() if value not in ("", None)}
    shape = {
        key: value
        for key, value in config.items()
        if key not in ("architectures", "attn", *LOCAL_KEYS)
    }
    shape |= shape.pop("shape") if own else {}
    mixers = {name: shape.pop(name) for name in dict.fromkeys(shape["layer_types"])} if own else {}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(dict.fromkeys(['longfire', config['model_type']]))}]",
        "---",
        "",
        f"# {name}",
        "",
        f"{architecture} of {parameters:,} parameters, trained with longfire.",
        "",
        "## Use",
        "",
        USE.format(imports=imports, name=name),
        "",
        *([by_us, ""] if family else []),
        *table("How it came to be", shown),
        *table("Shape", shape),
        *(table("Softmax layers", config["attn"]) if config.get("attn") else []),
        *(line for name, settings in mixers.items() for line in table(f"Layers: {name}", settings)),
        "## Checked",
        "",
        f"{str(check)[0].upper()}{str(check)[1:]}.",
        "",
    ]
    return "\n".join(lines)


def files_of_mixers(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the files of model.plugins that mixers of the model are defined in, which an export
    does not hold."""
    classes = [MIXERS[mixer_of(name)] for name in config["shape"]["layer_types"]]
    files = [
        inspect.getfile(mixer) for mixer in classes if not mixer.__module__.startswith("longfire.")
    ]
    return tuple(dict.fromkeys(Path(file).name for file in files))


def table(title: str, rows: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    cells = [f"| {cell(key)} | {cell(value)} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]


def cell(value: Any) -> str:
    """A value as a cell of a Markdown table, without folders of this machine."""
    if type(value) is int and value >= 10_000:
        return f"{value:,}"
    return FOLDERS_IN_TEXT.sub("", str(value)).replace("|", "\\|").replace("\n", " ")


def without_folders(name: str) -> str:
    """The last part of a path of this machine, as a source's name; the name of a dataset or model
    of the hub as it is."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name
