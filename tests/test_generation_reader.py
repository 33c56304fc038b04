"""generation/reader.py: text is shown in whole characters, up to a stop."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.data.tokenizer import bytes_tokenizer, train_tokenizer
from longfire.generation.reader import Reader

pytestmark = pytest.mark.dtype
TEXT = "naïve 漢字 🙂 and\n\n  tabs\tand 12345 the the the end"


@pytest.fixture(scope="module")
def words():
    return train_tokenizer([TEXT * 3], 300)


def pushed(reader: Reader, ids: list[int]) -> list[str]:
    """What a reader shows, piece by piece."""
    shown = []
    for i in ids:
        shown.append(reader.push(i))
        if reader.ended:
            break
    return [text for text in [*shown, reader.rest()] if text]


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_streamed_text_is_the_text(kind, words):
    tokenizer = bytes_tokenizer() if kind == "bytes" else words
    ids = tokenizer.encode(TEXT)
    for start in (1, len(ids) // 2):
        streamed = pushed(Reader(tokenizer, ids[:start]), ids[start:])
        assert not any("\ufffd" in piece for piece in streamed)
        assert tokenizer.decode(ids[:start]) + "".join(streamed) == TEXT
        assert len(streamed) > 5


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    tokenizer = bytes_tokenizer()
    shown = pushed(Reader(tokenizer, [65]), [66, 0xE6, 0xBC])
    assert "".join(shown) == tokenizer.decode([65, 66, 0xE6, 0xBC])[1:]


@given(
    some.text("abc", max_size=12), some.lists(some.text("abc", min_size=1, max_size=3), max_size=3)
)
@settings(deadline=None)
def test_stops_cut_the_text(whole, stops):
    reader = Reader(bytes_tokenizer(), [0], tuple(stops))
    shown = "".join(pushed(reader, list(whole.encode())))
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert reader.ended == bool(ends)
    if not ends:
        assert shown == whole
    else:  # the first stop that is complete ends the text; another that began earlier may be completed by the same piece
        assert whole.startswith(shown) and any(whole.startswith(stop, len(shown)) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_what_cannot_begin_a_stop_is_shown_at_once():
    assert pushed(Reader(bytes_tokenizer(), [0], ("<|e",)), list(b"abcd<e<|x")) == [
        *"abcd",
        "<e",
        "<|x",
    ]
