"""`longfire eval`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, add_which_model
from longfire.config.options import Scoring
from longfire.launch import stay_offline, world


def evaluate(words: Sequence[str]) -> int:
    """Loss, perplexity and bits per byte on validation documents or other texts; hidden needles;
    tasks of lm-eval; of a classifier loss and accuracy, or the classes of files."""
    parser = Parser(
        "eval", evaluate, "longfire eval runs/quickstart --step 100 --plot by-position.png"
    )
    parser.add_argument("run", type=Path, help="a run folder, or a folder of Hugging Face weights")
    add_which_model(parser)
    parser.add_fields(Scoring)
    options = parser.parse_words(words)
    scoring = parser.taken(Scoring, options)
    if scoring.tasks and not scoring.allow_download:
        stay_offline()
    from longfire.checkpoint.provenance import LANGUAGE_MODELING, task_of

    if task_of(options.run) != LANGUAGE_MODELING:
        from longfire.evaluation.class_scores import main as score_classes

        return score_classes(options.run, scoring, options.step, options.plugins, world())
    from longfire.evaluation.scores import main as score

    return score(options.run, scoring, options.step, options.plugins)
