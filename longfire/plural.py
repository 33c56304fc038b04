"""Numbers of things in messages: 1 document, 2,000 documents."""


def counted(number: int, thing: str) -> str:
    """The number and the thing, which takes an s unless there is one of it."""
    if number == 1:
        return f"{number:,} {thing}"
    return f"{number:,} {thing}s"
