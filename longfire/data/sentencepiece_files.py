"""SentencePiece models, the `tokenizer.model` of Llama and of models like it, as a tokenizer of the
`tokenizers` library (Kudo & Richardson 2018, arXiv 1808.06226).

The conversion is compared with the sentencepiece library itself on `probe_texts` whenever a file is
read, and refused where one id differs: weights would otherwise be given other ids than they were
trained with. Byte pair encodings that leave characters as they are convert exactly. Unigram models,
and models that normalise Unicode, do not.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib import import_module
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from longfire.errors import DataError, first_line
from longfire.regular_files import read_regular

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"  # stands for a space in pieces
PROBE_SEED = 0
PROBE_TEXTS = 4000
PIECES_OF_A_PROBE = 6
LONGEST_RUN = 66  # longer than any run of one character that models have as a piece
TRANSFORMERS_FIX = "name its tokenizer.json (transformers saves one beside a model)"

HOSTILE_TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    " \n \n\n",
    "\t",
    "\r\n",
    " a",
    "a ",
    "  a  b  ",
    "\x00",
    "a\x00b",
    "\x01\x02\x7f",
    f"{SPACE}",
    f" {SPACE} x{SPACE}{SPACE}",
    "🙂👩‍👩‍👧 end",
    "日本語のテキスト、中文字符",
    "العربية हिन्दी",
    "e\u0301 a\u0300\u0323 ﬁ ① ™ ½",
    "\u00a0 x \u3000 y \u200b z \ufeff",
    "<s>",
    "</s> <unk> <0x41>",
    "x</s>",
    "\U0010ffff",
)


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type` of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: PieceType

    @property
    def surface(self) -> str:
        """The text that the piece stands for."""
        return self.text.replace(SPACE, " ")


@dataclass(frozen=True)
class SentencePieceModel:
    """What a file says.

    content: the file. bos, eos: the pieces that begin and end a text, "" if there is none.
    """

    content: bytes
    pieces: tuple[Piece, ...]
    is_bpe: bool
    has_byte_fallback: bool
    normalization: str
    has_character_map: bool
    adds_space: bool
    removes_spaces: bool
    bos: str
    eos: str

    def of_type(self, *types: PieceType) -> list[str]:
        """The texts of all pieces of these types, in the order of their ids."""
        return [piece.text for piece in self.pieces if piece.type in types]


def is_sentencepiece(content: bytes) -> bool:
    """Whether a file may be a SentencePiece model: a protocol buffer whose first field is a
    piece. Files of tiktoken, which have the same name, are text."""
    return content[:1] == b"\n"


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """The model in a file. Raises DataError when it is none, or when the library that reads it is
    not installed."""
    try:
        import sentencepiece  # an extra

        # protobuf makes the classes of this module when it is imported: types are not known
        messages = import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise DataError(
            f"{file}: a SentencePiece model is read with the package sentencepiece "
            f"({first_line(error, None)}): `pip install 'longfire[sentencepiece]'`, or "
            f"{TRANSFORMERS_FIX}"
        ) from error
    content = read_regular(file)
    proto = messages.ModelProto()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        proto.ParseFromString(content)
    except Exception as error:  # protobuf has an exception of its own, sentencepiece RuntimeError
        raise DataError(
            f"{file}: not a SentencePiece model ({first_line(error, None)}); fetch the file again"
        ) from error
    pieces = []
    for entry in proto.pieces:
        pieces.append(Piece(entry.piece, entry.score, PieceType(entry.type)))
    ends = []
    for number in (processor.bos_id(), processor.eos_id()):
        ends.append(pieces[number].text if number >= 0 else "")
    trainer = proto.trainer_spec
    normalizer = proto.normalizer_spec
    return SentencePieceModel(
        content=content,
        pieces=tuple(pieces),
        is_bpe=trainer.model_type == trainer.BPE,
        has_byte_fallback=trainer.byte_fallback,
        normalization=normalizer.name,
        has_character_map=bool(normalizer.precompiled_charsmap),
        adds_space=normalizer.add_dummy_prefix,
        removes_spaces=normalizer.remove_extra_whitespaces,
        bos=ends[0],
        eos=ends[1],
    )


def refusal(model: SentencePieceModel) -> str:
    """Why the `tokenizers` library cannot give the ids of a model; "" where it can."""
    if not model.is_bpe:
        return "it is no byte pair encoding (BPE) but a unigram model or another one"
    if model.has_character_map:
        return f"it normalises Unicode by a table of its own ({model.normalization})"
    symbols = model.of_type(PieceType.USER_DEFINED)
    if symbols and model.adds_space:
        return f"it has user-defined symbols ({symbols[0]}) and begins each text with a space"
    return ""


def backend_of(model: SentencePieceModel, file: Path) -> Backend:
    """The tokenizer with the ids of a model. Raises DataError naming what cannot be expressed, or
    the first text whose ids differ."""
    reason = refusal(model)
    if reason:
        raise DataError(
            f"{file}: this SentencePiece model cannot be read exactly: {reason}; {TRANSFORMERS_FIX}"
        )
    backend = converted(model)
    differing = first_difference(model, backend)
    if differing is not None:
        raise DataError(
            f"{file}: this SentencePiece model cannot be read exactly: {differing!r} has other ids "
            f"by sentencepiece; {TRANSFORMERS_FIX}"
        )
    return backend


def converted(model: SentencePieceModel) -> Backend:
    """A byte pair encoding with the pieces of a model and its treatment of spaces."""
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = model.of_type(PieceType.UNKNOWN)
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(model.pieces, vocabulary),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=model.has_byte_fallback,
        )
    )
    backend.normalizer = normalizers.Sequence(normalization_of(model))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.adds_space:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    special = model.of_type(PieceType.UNKNOWN, PieceType.CONTROL)
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    symbols = model.of_type(PieceType.USER_DEFINED)
    backend.add_tokens([AddedToken(text, normalized=False) for text in symbols])
    backend.encode_special_tokens = True
    return backend


def merges_of(pieces: Sequence[Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece merges, first those whose piece has the highest score: every way
    to cut a piece into two pieces."""
    merges: list[tuple[float, tuple[str, str]]] = []
    for piece in pieces:
        if piece.type is not PieceType.NORMAL:
            continue
        pairs = []
        for place in range(1, len(piece.text)):
            pair = (piece.text[:place], piece.text[place:])
            if pair[0] in vocabulary and pair[1] in vocabulary:
                pairs.append(pair)
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(piece.score, pair) for pair in pairs]
    merges.sort(key=lambda entry: -entry[0])  # stable: pairs of one piece stay in their order
    return [pair for _, pair in merges]


def normalization_of(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    """What happens to the spaces of a text."""
    steps: list[normalizers.Normalizer] = []
    if model.removes_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.removes_spaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    if model.adds_space:
        steps.append(normalizers.Prepend(SPACE))
    return steps


def probe_texts(model: SentencePieceModel) -> list[str]:
    """Texts on which a conversion is compared: each piece, joined pieces, runs of one character,
    white space, control characters, emoji, names of control pieces."""
    surfaces = [piece.surface for piece in model.pieces]
    parts = [*surfaces, *HOSTILE_TEXTS]
    generator = random.Random(PROBE_SEED)
    joined = []
    for _ in range(PROBE_TEXTS):
        joined.append("".join(generator.choices(parts, k=PIECES_OF_A_PROBE)))
    repeated = {surface[0] for surface in surfaces if len(surface) > 1 and len(set(surface)) == 1}
    runs = []
    for character in sorted(repeated):
        runs += [character * count for count in range(1, LONGEST_RUN)]
    return [*HOSTILE_TEXTS, *surfaces, *joined, *runs]


def first_difference(model: SentencePieceModel, backend: Backend) -> str | None:
    """The first probe whose ids are not those of the sentencepiece library; None if there is
    none."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model.content)
    texts = probe_texts(model)
    theirs = processor.encode(texts)
    ours = backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, theirs, ours):
        if ids != encoding.ids:
            return text
    return None
