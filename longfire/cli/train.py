"""`longfire train`."""

import json
from collections.abc import Sequence

from longfire.cli.arguments import MOST_USED, RecipeParser, read_run
from longfire.cli.lasting_output import let_output_end
from longfire.launch import world


def train(words: Sequence[str]) -> int:
    """Train a recipe to its last step, or resume from the newest whole checkpoint of its run
    folder."""
    parser = RecipeParser(
        "train",
        train,
        "longfire train quickstart --training.steps 300 --optimizer.lr 1e-3",
        most_used=MOST_USED,
    )
    run, _ = read_run(parser, words, world=world())
    let_output_end()
    if run.job.print_args and run.world.is_first:
        import tomli_w

        print(tomli_w.dumps(run.settings()))
        print(f"# the model, as config.json has it: {json.dumps(run.model_config.to_dict())}\n")
    from longfire.training.loop import train as train_run

    return train_run(run)
