"""A model's config.json on disk, ours or a Hugging Face family's: strict JSON, errors with file and
line."""

import json
from pathlib import Path
from typing import Any

from longfire.config import shipped
from longfire.errors import SettingsError


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of a config file or of a folder's config.json. Raises SettingsError naming file,
    line and fix."""
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise SettingsError(
            f"model.config = {str(path)!r}: no such file; name a config.json, a folder that "
            f"holds one, or a config that comes with longfire{shipped.nearest_model(str(path))}"
        )
    if path.suffix == ".toml":
        raise SettingsError(
            f"{path} is a recipe, and a model's config is JSON: name a config.json, or the run "
            "folder of a run of that recipe"
        )
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=without_repeats, parse_constant=infinity_alone)
    except json.JSONDecodeError as e:
        line = e.doc.splitlines()[e.lineno - 1].strip()[:80] if e.doc.strip() else "an empty file"
        raise SettingsError(
            f"{path}: not valid JSON: line {e.lineno}, column {e.colno}: {e.msg}: {line}"
        ) from e
    except (OSError, ValueError) as e:
        raise SettingsError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise SettingsError(f"{path}: a JSON object was expected, not {type(config).__name__}")
    return config


def without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises ValueError where a key stands twice, of which Python would silently
    take the last."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{next(name for name in names if names.count(name) > 1)!r} stands twice in a table"
        )
    return table


def infinity_alone(name: str) -> float:
    """Infinity, which is no JSON: some classes of transformers write it for "no limit". Raises
    ValueError for NaN."""
    if name == "NaN":
        raise ValueError(f"{name} is no number of JSON")
    return float(name)
