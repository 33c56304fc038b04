"""Numbers of things in messages: 1 document, 2,000 documents; 3 min 20 s."""


def counted(number: int, thing: str) -> str:
    """The number and the thing, which takes an s unless there is one of it."""
    if number == 1:
        return f"{number:,} {thing}"
    return f"{number:,} {thing}s"


def duration(seconds: float) -> str:
    """The two largest units: 42 s, 3 min 20 s, 5 h 12 min, 4 d 3 h."""
    whole = round(seconds)
    for large, small, size, ratio in (
        ("d", "h", 86400, 3600),
        ("h", "min", 3600, 60),
        ("min", "s", 60, 1),
    ):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // ratio} {small}"
    return f"{whole} s"
