"""`longfire bench`."""

from collections.abc import Sequence

from longfire.cli.arguments import RecipeParser, at_least, read_run
from longfire.launch import world


def bench(words: Sequence[str]) -> int:
    """How fast this machine trains a recipe, on random tokens: tokens a second, where a step's time
    goes, memory."""
    parser = RecipeParser(
        "bench",
        bench,
        "longfire bench quickstart --training.batch_size 16 --steps 20",
        sections=("model", "training", "activation_checkpoint"),
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=10,
        metavar="N",
        help="steps to measure, after 2 of warm-up (default: 10)",
    )
    run, options = read_run(parser, words, world=world())
    from longfire.config.rules.tasks import refuse_other_tasks
    from longfire.training.throughput import bench as measure

    refuse_other_tasks(run, "longfire bench")
    measure(run, options.steps)
    return 0
