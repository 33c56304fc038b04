"""`longfire prepare`."""

from collections.abc import Sequence

from longfire.arguments import RecipeParser, read_run


def prepare(words: Sequence[str]) -> int:
    """Text -> tokens: make the token stores of a recipe, once; train does it too, but this needs no device."""
    run, _ = read_run(
        RecipeParser(
            "prepare", prepare, "longfire prepare quickstart --data.num_workers 8", sections=("data", "tokenizer")
        ),
        words,
        False,
    )
    from longfire.data.prepare import prepare as make_stores
    from longfire.provenance import tokenizer_line

    prepared = make_stores(run.data, run.tokenizer)
    print(tokenizer_line(prepared.tokenizer, run.tokenizer))
    return 0
