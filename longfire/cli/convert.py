"""`longfire convert`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, add_plugins, comma_separated
from longfire.config.shipped import model_config


def convert(words: Sequence[str]) -> int:
    """Begin another architecture from pretrained weights: what matches is copied, the rest is
    fresh, and what is left is named."""
    parser = Parser(
        "convert",
        convert,
        "longfire convert --model mistral-7b --config gla-7b-mistral --output gla-7b",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run folder, or a folder of Hugging Face weights",
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="JSON",
        help="config.json of the model to be made, or the name of one that comes with longfire; "
        "what it does not say is as in "
        "--model",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where to; train it with --model.config DIR --model.weights DIR",
    )
    parser.add_argument(
        "--keep-attention",
        type=comma_separated(int),
        default=(),
        metavar="0,7,...",
        help="layers, counted from 0, that keep the attention of the source (default: none)",
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help="of what stays fresh (default: 42)"
    )
    add_plugins(parser)
    options = parser.parse_words(words)
    from longfire.huggingface.convert import convert as convert_model

    config = options.config
    shipped_config = model_config(str(options.config))
    if shipped_config and not config.exists():
        config = shipped_config
        print(f"--config {options.config}: {config}, which comes with longfire")
    kept = options.keep_attention
    plugins = options.plugins
    print(convert_model(options.model, config, options.output, kept, options.seed, plugins))
    return 0
