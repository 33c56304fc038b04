"""`longfire generate`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, add_which_model
from longfire.config.options import Sampling


def generate(words: Sequence[str]) -> int:
    """Continue prompts with a run's newest checkpoint, or with Hugging Face weights."""
    parser = Parser(
        "generate",
        generate,
        'longfire generate runs/quickstart --prompt "def " --max_new_tokens 64',
    )
    parser.add_argument(
        "folder", type=Path, help="a run folder, or a folder of Hugging Face weights"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        is_prose=True,
        help="text to continue, dim on a terminal so that its end is seen; may be repeated",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, or JSON lines with a `prompt` (.jsonl)",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="ask for lines and keep the dialogue (default: without a prompt)",
    )
    add_which_model(parser)
    parser.add_argument(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="prompts that are continued together (default: 1)",
    )
    parser.add_argument(
        "--stats",
        action="store_true",
        help="at the end show tokens/s, ms a token, bytes of the cache",
    )
    parser.add_fields(Sampling, repeated=("stop",))
    options = parser.parse_words(words)
    from longfire.generation.prompts import main as continue_prompts

    return continue_prompts(
        options.folder,
        parser.taken(Sampling, options),
        options.prompt,
        options.prompts,
        options.interactive,
        options.batch_size,
        options.stats,
        options.step,
        options.plugins,
    )
