"""Whether transformers reads the files of a tokenizer as longfire does."""

from pathlib import Path
from typing import TYPE_CHECKING

from longfire.data.sentencepiece_files import MODEL_FILE
from longfire.data.tokenizer import Tokenizer
from longfire.errors import CheckpointError, first_line
from longfire.huggingface.comparing import check, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # seconds of imports

# What tokenizers differ on.
TEXT = "def f(x):\n\treturn x ** 2  # naïve 漢字 🙂\n\n  1234567 <eos> </s>"


def compare_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises CheckpointError when transformers reads the tokenizer's files as another tokenizer, or
    not at all."""
    _, is_same = by_auto_tokenizer(tokenizer, folder)
    check(
        is_same,
        f"transformers' AutoTokenizer gives other ids than ours from the files in {folder.name}",
    )


def by_auto_tokenizer(tokenizer: Tokenizer, folder: Path) -> tuple[str, bool]:
    """The class that AutoTokenizer makes of the files, and whether it is the same tokenizer as
    ours. Raises CheckpointError."""
    from transformers import AutoTokenizer  # seconds of imports, only when something is exported

    try:
        with quiet_transformers():
            theirs = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            ids = encoded(theirs)  # some fail only here
    except Exception as error:  # each class has demands of its own; tokenizers raises Exception
        raise CheckpointError(
            f"AutoTokenizer cannot read these files ({first_line(error)})"
        ) from error
    ends = (theirs.bos_token_id, theirs.eos_token_id)
    has_same_ends = ends == (tokenizer.bos_id, tokenizer.eos_id)
    return type(theirs).__name__, has_same_ends and ids == tokenizer.encode(TEXT)


def compare_imported_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Compare with the tokenizer.json as it is. Some classes of transformers, which the other files
    name, build a part of it anew: then a line about the difference, else "".

    Raises CheckpointError when tokenizer.json itself gives other ids than ours.
    """
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file() and not (folder / MODEL_FILE).is_file():
        compare_tokenizer(tokenizer, folder)
        return ""
    if not file.is_file():  # a SentencePiece model, which was compared with its own library
        return difference_of_classes(tokenizer, folder, MODEL_FILE)
    as_it_is = PreTrainedTokenizerFast(tokenizer_file=str(file))
    check(
        encoded(as_it_is) == tokenizer.encode(TEXT),
        f"{file} gives other ids by transformers than by longfire",
    )
    return difference_of_classes(tokenizer, folder, file.name)


def difference_of_classes(tokenizer: Tokenizer, folder: Path, file_name: str) -> str:
    """A line where the class that AutoTokenizer makes of a folder gives other ids than the file of
    this name, which our tokenizer comes from; else ""."""
    try:
        name, is_same = by_auto_tokenizer(tokenizer, folder)
        difference = (
            f"AutoTokenizer makes a {name} of these files, which gives other ids than their "
            f"{file_name}"
        )
    except CheckpointError as error:
        is_same = False
        difference = str(error)
    if is_same:
        return ""
    return (
        f"tokenizer: {difference}. longfire takes {file_name} as it is, and its exports name a "
        "class that does too"
    )


def encoded(theirs: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of TEXT by a tokenizer of transformers."""
    return theirs(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
