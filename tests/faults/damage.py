"""What the kinds of the fuzzer share: how bytes and JSON are damaged, and what a case must end in."""

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from longfire.errors import UserError

ODD_VALUES = (
    None,
    True,
    -1,
    0,
    2**63,
    10**399,
    1.5,
    float("inf"),
    "",
    "12",
    "../outside",
    [],
    [[]],
    {},
    {"a": []},
)


# Makes the folder that is damaged; damages it; reads it and compares what was read
class Kind(NamedTuple):
    make: Callable[[Path], None]
    damage: Callable[[Path, random.Random], None]
    read: Callable[[Path], None]


def flip_bytes(file: Path, chance: random.Random) -> None:
    """Cut the file off, overwrite a part of it, or put something into it."""
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content) + 1)
    piece = chance.choice(
        [chance.randbytes(4), b"\xff", b"[" * 100_000, b"1" * 5000, b'"', b"\x00", b"{", b"\n[x]\n"]
    )
    way = chance.randrange(4)
    if way == 0:
        del content[at:]
    elif way == 1:
        content[at : at + len(piece)] = piece
    elif way == 2:
        content[at:at] = piece
    elif content:
        content[at % len(content)] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def flip_any(folder: Path, chance: random.Random) -> None:
    flip_bytes(chance.choice(files_of(folder)), chance)


def outside_of(folder: Path) -> Path:
    """Somebody else's file beside a folder, which nothing may change."""
    outside = folder.with_name(folder.name + ".outside")
    outside.write_text("theirs\n")
    return outside


def put_instead(file: Path, outside: Path, chance: random.Random) -> None:
    """Put a FIFO, a link to a file outside, a device, a folder or a socket in the place of a
    file."""
    file.unlink(missing_ok=True)
    way = chance.randrange(5)
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.symlink_to(outside)
    elif way == 2:
        file.symlink_to("/dev/zero")
    elif way == 3:
        file.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as opened:
            here = os.getcwd()
            os.chdir(file.parent)
            opened.bind(file.name)
            os.chdir(here)


def odd_json(value: object, chance: random.Random) -> object:
    """The value with one place of it removed or replaced by something odd."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(list(keys))
        changed = value.copy()
        if chance.random() < 0.2:
            del changed[key]
        else:
            changed[key] = odd_json(value[key], chance)
        return changed
    return chance.choice(ODD_VALUES)


def forge_json(file: Path, chance: random.Random) -> None:
    file.write_text(json.dumps(odd_json(json.loads(file.read_text()), chance)))


def or_message(read: Callable[[], object]) -> None:
    try:
        read()
    except UserError as error:
        assert str(error), "an error without a message"
