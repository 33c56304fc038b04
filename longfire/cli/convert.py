"""`longfire convert`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, add_plugins, comma_separated
from longfire.config.paths import may_be_on_hub
from longfire.config.shipped import model_config, nearest_model


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
        required=True,
        metavar="DIR",
        help="a run folder, a folder of Hugging Face weights, or a model's name on the hub",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="JSON",
        help="config.json of the model to be made, the name of one that comes with longfire, or a "
        "model's name on the hub; what it does not say is as in --model",
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
    from longfire.huggingface.hub_models import model_folder

    model = model_folder(options.model, "--model")
    config = config_named(options.config)
    kept = options.keep_attention
    plugins = options.plugins
    print(convert_model(model, config, options.output, kept, options.seed, plugins))
    return 0


def config_named(name: str) -> Path:
    """The config that --config names: a file here, one that comes with longfire, or one of the
    hub. Raises SettingsError where the hub cannot give it."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    shipped_config = model_config(name)
    if shipped_config:
        print(f"--config {name}: {shipped_config}, which comes with longfire")
        return shipped_config
    from longfire.huggingface.hub_models import config_folder

    if may_be_on_hub(name):
        return config_folder(name, "--config", nearest_model(name)) / "config.json"
    return path
