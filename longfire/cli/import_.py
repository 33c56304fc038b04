"""`longfire import`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, add_plugins
from longfire.errors import SettingsError


def adopt(words: Sequence[str]) -> int:
    """Hugging Face weights -> a run folder to train, evaluate and generate from, compared with
    their own class before it counts."""
    parser = Parser("import", adopt, "longfire import downloads/SmolLM2-135M runs/continued")
    parser.add_argument(
        "source",
        nargs="?",
        help="a folder with config.json, weights and tokenizer, or a model's name on the hub",
    )
    parser.add_argument(
        "run", nargs="?", type=Path, help="the run folder to make; its step 0 is this model"
    )
    add_words_of_hf2jax(parser)
    add_plugins(parser)
    options = parser.parse_words(words)
    take_words_of_hf2jax(options)
    from longfire.huggingface.import_ import import_hf

    print(import_hf(options.source, options.run, plugins=options.plugins))
    run = options.run
    print(
        f"{run} is a run at step 0; `longfire train {run}/run.toml --data.dataset FILES "
        "--training.steps 100` resumes from it"
    )
    return 0


def add_words_of_hf2jax(parser: Parser) -> None:
    """The options of RingAttention's hf2jax.py, which does the same."""
    parser.add_argument("--checkpoint_dir", metavar="FOLDER", help="SOURCE, as hf2jax spells it")
    parser.add_argument(
        "--output_file", type=Path, metavar="RUN", help="RUN, as hf2jax spells it: a folder here"
    )
    parser.add_argument(
        "--model_size", metavar="SIZE", help="of hf2jax: not needed, config.json says it"
    )
    parser.add_argument(
        "--streaming", action="store_true", help="of hf2jax: not needed, weights are read in parts"
    )


def take_words_of_hf2jax(options: argparse.Namespace) -> None:
    """Source and run folder by either spelling. Raises SettingsError where one is missing, or given
    twice."""
    for name, spelling in (("source", "checkpoint_dir"), ("run", "output_file")):
        theirs = getattr(options, spelling)
        if theirs is not None and getattr(options, name) is not None:
            raise SettingsError(f"{name.upper()} and --{spelling} mean the same; keep one of them")
        if theirs is not None:
            setattr(options, name, theirs)
        if getattr(options, name) is None:
            raise SettingsError(
                f"{name.upper()} is missing: longfire import SOURCE RUN; `longfire import --help` "
                "shows how"
            )
