"""A model's config.json on disk, ours or a Hugging Face family's: strict JSON, errors with file and
line."""

from pathlib import Path
from typing import Any

from longfire.config import shipped
from longfire.errors import SettingsError
from longfire.own_files import of_type, parse_json, problem_of
from longfire.regular_files import read_regular


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
        config = of_type(parse_json(read_regular(path), is_strict=True), dict[str, Any])
    except (OSError, ValueError) as e:
        raise SettingsError(f"{path}: {problem_of(e)}") from e
    return config
