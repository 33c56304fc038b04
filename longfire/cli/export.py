"""`longfire export`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, add_which_model
from longfire.errors import SettingsError


def export(words: Sequence[str]) -> int:
    """A checkpoint -> Hugging Face weights, config and tokenizer, reloaded and compared before it
    counts as done."""
    parser = Parser("export", export, "longfire export runs/quickstart exported --dtype bfloat16")
    parser.add_argument("run", type=Path, help="a run folder; the run may still be training")
    parser.add_argument("out", type=Path, nargs="?", help="where to (default: <run>/hf)")
    add_which_model(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="(default: checkpoint.export_dtype)",
    )
    parser.add_argument(
        "--compare",
        choices=("logits", "bytes"),
        default="logits",
        help="what is compared before it counts as done; bytes alone need one shard in memory "
        "and not the model (default: logits)",
    )
    options = parser.parse_words(words)
    out = options.out or options.run / "hf"
    from longfire.checkpoint.provenance import IMAGES, RUN_TOML, task_of

    if task_of(options.run) == IMAGES:
        if not (options.run / RUN_TOML).is_file():
            raise SettingsError(
                f"{options.run} is no run folder: it holds Hugging Face weights already"
            )
        from longfire.huggingface.vit_export import export_vit_run

        if options.compare == "bytes":
            raise SettingsError(
                "--compare bytes: the logits of a model of images are always compared: leave it out"
            )
        print(export_vit_run(options.run, options.step, out, options.dtype, options.plugins))
        return 0
    from longfire.huggingface.export import export_run

    logits = options.compare == "logits"
    print(export_run(options.run, options.step, out, options.dtype, options.plugins, logits))
    return 0
