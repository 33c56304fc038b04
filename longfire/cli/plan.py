"""`longfire plan`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import RecipeParser, at_least, read_run


def plan(words: Sequence[str]) -> int:
    """What a recipe will hold, send and take on devices that are not here, and which plans would do
    better."""
    parser = RecipeParser(
        "plan",
        plan,
        "longfire plan transformer-340m-fineweb --gpus 64 --device h100-80gb",
        sections=("model", "training", "parallelism", "activation_checkpoint"),
    )
    parser.add_argument(
        "--gpus",
        type=at_least(1),
        default=1,
        metavar="N",
        help="devices, a process each (default: 1)",
    )
    parser.add_argument(
        "--device",
        default="h100-80gb",
        metavar="NAME",
        help="a100-40gb, a100-80gb, h100-80gb, h100-pcie, h200-141gb, b200-180gb, l40s-48gb "
        "(default: h100-80gb)",
    )
    parser.add_argument(
        "--memory",
        default="",
        metavar="SIZE",
        help="of a device, as 80GB or 80GiB (default: that of --device)",
    )
    parser.add_argument(
        "--host-memory",
        default="",
        metavar="SIZE",
        help="a device's share of its machine's memory, for what is offloaded to it (default: that "
        "of --device's usual machine)",
    )
    parser.add_argument(
        "--alternatives",
        type=at_least(0),
        default=8,
        metavar="N",
        help="other plans to show; 0: none (default: 8)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument(
        "--context",
        action="store_true",
        help="instead: the longest row that fits so many devices, for each mixer, and Ring "
        "Attention's tables beside ours",
    )
    run, options = read_run(parser, words, world=None)
    from longfire.config.rules.tasks import refuse_other_tasks
    from longfire.parallel.cost import device_of
    from longfire.planner.planner import Planner
    from longfire.planner.tables import plan_run

    device = device_of(options.device, options.memory, options.host_memory)
    if options.context:
        refuse_other_tasks(run, "longfire plan --context")
        from longfire.planner.context_tables import plan_context

        plan_context(run, device, options.json)
    else:
        plan_run(Planner(run, device), options.alternatives, options.json)
    return 0
