"""The model card of an export: what the model is, how it came to be, how to load it, what was
checked."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path

from longfire.config.model_config import mixer_of
from longfire.huggingface.check import Check
from longfire.huggingface.families import FAMILIES
from longfire.huggingface.family import Config, without
from longfire.huggingface.own_config import LONGFIRE, is_own_export
from longfire.messages import visible
from longfire.mixers import MIXERS

# The folders of a path of this machine in a text: /data/me/x.txt, ~/x, C:\me\x; not https://x/y,
# owner/set or and/or. The card is for others: folders of the machine that trained are of no use to
# them, and may tell more than its owner wants.
POSIX = r"~?/(?:[^\s/'\",;()\]]+/)*"
WINDOWS = r"[A-Za-z]:\\(?:[^\s\\'\",;]+\\)*"
FOLDERS_IN_TEXT = re.compile(rf"(?<![\w.:/~\\])(?:{POSIX}|{WINDOWS})(?=[^\s/\\])")
# Keys of a config of transformers that may name a folder of this machine.
LOCAL_KEYS = ("_name_or_path", "name_or_path")
# Characters that begin code, emphasis, links and cells in Markdown
MARKS = re.compile(r"[\\`*|\[\]]")

USE = """```python
{imports}
model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
```"""


def model_card(
    name: str,
    config: Config,
    parameters: int,
    facts: Mapping[str, object],
    check: Check,
) -> str:
    """README.md of an export, with the front matter that the hub reads."""
    architecture = config["architectures"][0]
    facts = {key: value for key, value in facts.items() if value not in ("", None)}
    tags = ", ".join(dict.fromkeys(["longfire", config["model_type"]]))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{tags}]",
        "---",
        "",
        f"# {plain_markdown(name)}",
        "",
        f"{architecture} of {parameters:,} parameters, trained with longfire.",
        "",
        *how_to_use(name, config),
        *table("How it came to be", facts),
        *tables_of_model(config),
        "## Checked",
        "",
        f"{str(check)[0].upper()}{str(check)[1:]}.",
        "",
    ]
    return "\n".join(lines)


def how_to_use(name: str, config: Config) -> list[str]:
    """The lines that say how to load the model."""
    is_own = is_own_export(config)
    family = LONGFIRE if is_own else FAMILIES.get(config["model_type"])
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if family and family.package != "transformers":
        registers = f"# registers {config['architectures'][0]}"
        imports = f"import {family.package}  {registers}\n{imports}"
    files = files_of_mixers(config) if is_own else ()
    if files:
        imports += (
            "\nfrom longfire.plugins import load_plugins"
            f"\nload_plugins({files!r})  # where its mixers are defined"
        )
    lines = ["## Use", "", USE.format(imports=imports, name=json.dumps(name)), ""]
    generate = "Or `longfire generate FOLDER --prompt TEXT`"
    if is_own:
        lines += [f"{generate}.", ""]
    elif family:
        lines += [f"{generate}, which needs neither of them.", ""]
    return lines


def tables_of_model(config: Config) -> list[str]:
    """The settings of the model, and those of its mixers."""
    hidden = ("architectures", "attn", *LOCAL_KEYS)
    shown = without(config, hidden)
    tables_of_mixers: list[str] = []
    if is_own_export(config):
        shown |= shown.pop("shape")
        for mixer in dict.fromkeys(shown["layer_types"]):
            tables_of_mixers += table(f"Layers: {mixer}", shown.pop(mixer))
    lines = table("Shape", shown)
    if config.get("attn"):
        lines += table("Softmax layers", config["attn"])
    return lines + tables_of_mixers


def files_of_mixers(config: Config) -> tuple[str, ...]:
    """Names of the files of model.plugins that mixers of the model are defined in, which an export
    does not hold."""
    names = []
    for name in config["shape"]["layer_types"]:
        mixer = MIXERS[mixer_of(name)]
        if not mixer.__module__.startswith("longfire."):
            names.append(Path(inspect.getfile(mixer)).name)
    return tuple(dict.fromkeys(names))


def table(title: str, rows: Mapping[str, object]) -> list[str]:
    """The lines of a heading and a Markdown table; none without rows."""
    if not rows:
        return []
    cells = [f"| {cell(key)} | {cell(value)} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]


def cell(value: object) -> str:
    """A value as a cell of a Markdown table, without folders of this machine."""
    if type(value) is int and value >= 10_000:
        return f"{value:,}"
    return plain_markdown(FOLDERS_IN_TEXT.sub("", str(value)))


def plain_markdown(text: str) -> str:
    """The text in a line of Markdown that is shown as it is: no HTML, link, picture or code."""
    text = visible(text).replace("\n", " ")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKS.sub(r"\\\g<0>", text)


def without_folders(name: str) -> str:
    """The last part of a path of this machine, as a source's name; the name of a dataset or model
    of the hub as it is."""
    path = Path(name).expanduser()
    if path.is_absolute() or path.exists():
        return path.name
    return name
