"""Numbers of things in messages: 1 document, 2,000 documents."""


def counted(number: int, thing: str) -> str:
    """The number and the thing, which takes an s unless there is one of it."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
