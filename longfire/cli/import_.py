"""`longfire import`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, add_plugins


def adopt(words: Sequence[str]) -> int:
    """Hugging Face weights -> a run folder to train, evaluate and generate from, compared with
    their own class before it counts."""
    parser = Parser("import", adopt, "longfire import downloads/SmolLM2-135M runs/continued")
    parser.add_argument(
        "source",
        help="a folder with config.json, weights and tokenizer, or a model's name on the hub",
    )
    parser.add_argument("run", type=Path, help="the run folder to make; its step 0 is this model")
    add_plugins(parser)
    options = parser.parse_words(words)
    from longfire.huggingface.import_ import import_hf

    print(import_hf(options.source, options.run, plugins=options.plugins))
    run = options.run
    print(
        f"{run} is a run at step 0; `longfire train {run}/run.toml --data.dataset FILES "
        "--training.steps 100` resumes from it"
    )
    return 0
