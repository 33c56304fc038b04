"""`longfire prepare`."""

from collections.abc import Sequence

from longfire.cli.arguments import RecipeParser, read_run


def prepare(words: Sequence[str]) -> int:
    """Text -> tokens: make the token stores of a recipe, once; train does it too, but this needs no
    device."""
    parser = RecipeParser(
        "prepare",
        prepare,
        "longfire prepare quickstart --data.num_workers 8",
        sections=("data", "tokenizer"),
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the token stores whole and compare their checksums; stores without checksums "
        "of blocks get them",
    )
    run, options = read_run(parser, words, False)
    from longfire.checkpoint.provenance import tokenizer_line
    from longfire.config.rules.tasks import refuse_other_tasks
    from longfire.data.prepare import prepare as make_stores
    from longfire.data.prepare import verify

    refuse_other_tasks(run, "longfire prepare")
    with make_stores(run.data, run.tokenizer) as prepared:
        print(tokenizer_line(prepared.tokenizer, run.tokenizer, run.data.record_format))
        if options.verify:
            verify(prepared)
    return 0
