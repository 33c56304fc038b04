"""data.record_format = "chat": a chat template writes a conversation, and its answers are learned."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from longfire.config import settings
from longfire.data.chat import chat_encoder
from longfire.data.prepare import Prepared, prepare
from longfire.data.record_format import Chat
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.errors import DataError, SettingsError

TEMPLATE = """\
{%- for message in messages -%}
    {{ bos_token + message.role + ': ' }}
    {%- if message.role == 'assistant' -%}
        {% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else -%}
        {{ message.content + eos_token }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ bos_token + 'assistant: ' }}{%- endif -%}
"""


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """fsync is for power cuts; a killed process loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def tokenizer_with(folder: Path, template: str | None) -> Path:
    """A trained tokenizer with a chat template."""
    texts = ["the quick brown fox asks the user and the assistant answers: " * 20]
    Tokenizer.train(texts, 300).save(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    return tokenizer_with(tmp_path / "tokenizer", TEMPLATE)


def messages_of(*contents: str) -> list[dict[str, str]]:
    """A question, an answer, a question ..."""
    messages = []
    for number, content in enumerate(contents):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": content})
    return messages


CHATS = [
    messages_of("the quick fox?", "brown, é and 日本"),
    [{"role": "system", "content": "answers"}, *messages_of("one\ntwo", " three ", "four", "")],
    messages_of("no answer here"),
]


def prepared_of(folder: Path, tokenizer: Path, *chats: object, **changes) -> Prepared:
    folder.mkdir(exist_ok=True)
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    data = settings.Data(
        dataset=(str(file),),
        folder=str(folder / "stores"),
        num_workers=1,
        record_format=("chat",),
        **{"validation_fraction": 0.0, **changes},
    )
    return prepare(data, settings.Tokenizer(path=str(tokenizer)))


def test_ids_and_mask_are_those_of_transformers(tokenizer, tmp_path):
    """Which takes the mask from the template's own marks, and not from the beginning of answers."""
    theirs = AutoTokenizer.from_pretrained(str(tokenizer))
    stream = prepared_of(tmp_path, tokenizer, *[{"messages": m} for m in CHATS]).stores[0].train
    ids: list[int] = []
    mask: list[int] = []
    ends: list[int] = []
    for messages in CHATS:
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids += found["input_ids"]
        mask += found["assistant_masks"]
        ends.append(len(ids))
    assert stream.tokens(0, stream.length).tolist() == ids
    assert stream.loss_mask(0, stream.length).tolist() == [bool(m) for m in mask]
    assert stream.ends[:].tolist() == ends
    assert 0 < sum(mask) < len(mask)


CALLS = """\
{%- if tools is not none %}tools{% endif -%}
{%- if documents is not none %}documents{% endif -%}
{%- for message in messages -%}
    {{ message.role }}: {{ message.content }}
    {%- if message.tool_calls %}{{ message.tool_calls | tojson }}
        {{- message.tool_calls | tojson(indent=2, separators=(',', ':'), sort_keys=true) }}
    {%- endif %}{{ eos_token }}
{%- endfor -%}
"""


def test_what_a_template_is_given_is_that_of_transformers(tmp_path):
    """Tools and documents, which are none, and JSON that is not written for HTML."""
    call = {"name": "a", "arguments": {"é": "<b href='x'> & \"c\""}}
    asks = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [*messages_of("a", "b"), asks]
    folder = tokenizer_with(tmp_path / "calls", CALLS)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(messages, tokenize=False)
    ours = chat_encoder(from_folder(folder)).render(messages)
    assert ours == expected
    assert "<b href='x'> &" in ours


def test_the_default_of_several_templates(tokenizer, tmp_path):
    """As tokenizer_config.json lists them."""
    chat = {"messages": CHATS[0]}
    one = prepared_of(tmp_path, tokenizer, chat).stores[0].train
    (tokenizer / "chat_template.jinja").unlink()
    file = tokenizer / "tokenizer_config.json"
    templates = [{"name": "x", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
    several = prepared_of(tmp_path / "several", tokenizer, chat).stores[0].train
    assert several.tokens(0, several.length).tolist() == one.tokens(0, one.length).tolist()


def test_a_template_that_writes_nothing_makes_no_document(tmp_path):
    encoded, problem = encoded_by("{# nothing #}", tmp_path)
    assert encoded is None
    assert problem == "the chat template writes nothing for it"


def test_only_the_answers_are_learned(tokenizer, tmp_path):
    prepared = prepared_of(tmp_path, tokenizer, {"messages": messages_of("a", "b", "c", "d")})
    stream = prepared.stores[0].train
    learned = stream.tokens(0, stream.length)[stream.loss_mask(0, stream.length)]
    assert prepared.tokenizer.backend.decode(learned.tolist(), skip_special_tokens=False) == (
        "b<eos>d<eos>"
    )


def test_a_table_of_chats(tokenizer, tmp_path):
    """Where a message lacks a key that another one has, a table has null."""
    messages = [
        {"role": "user", "content": "a", "name": "x"},
        {"role": "assistant", "content": "b"},
    ]
    file = tmp_path / "chats.parquet"
    pq.write_table(pa.Table.from_pylist([{"turns": messages}]), file)
    data = settings.Data(
        dataset=(str(file),),
        folder=str(tmp_path / "stores"),
        record_format=("chat",),
        messages_field="turns",
        num_workers=1,
        validation_fraction=0.0,
    )
    wanted = settings.Tokenizer(path=str(tokenizer))
    table = prepare(data, wanted).stores[0].train
    lines = prepared_of(tmp_path, tokenizer, {"messages": messages}).stores[0].train
    assert table.tokens(0, table.length).tolist() == lines.tokens(0, lines.length).tolist()


WRONG = {
    "no messages": ({"text": "x"}, r"no field 'messages' .*set data\.messages_field"),
    "text": ({"messages": "x"}, "'messages' holds str, not messages"),
    "no role": ({"messages": [{"content": "x"}]}, "message 1 is no object with a `role`"),
    "no text": ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1 has no text"),
    "half a character": (
        {"messages": messages_of("a", "b\ud83d")},
        "`content` of message 2: half a surrogate pair at character 1",
    ),
    "half a character as a role": (
        {"messages": [{"role": "\ud83d", "content": "a"}]},
        "what the chat template writes: half a surrogate pair",
    ),
    "special": (
        {"messages": messages_of("a", "b<eos>c")},
        r"`content` of message 2 holds '<eos>', which is a special token",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_chats_are_named(name, tokenizer, tmp_path):
    record, message = WRONG[name]
    good = {"messages": CHATS[0]}
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: {message}"):
        prepared_of(tmp_path, tokenizer, good, record)
    prepared = prepared_of(tmp_path, tokenizer, good, record, skip_bad_documents=True)
    assert prepared.stores[0].manifest["progress"]["bad_documents"] == 1


def encoded_by(template: str, folder: Path) -> tuple[object, str]:
    tokenizer = from_folder(tokenizer_with(folder / "other", template))
    return chat_encoder(tokenizer).encode(Chat(tuple(messages_of("a", "b", "c", "d"))))


ESCAPES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
    "{{ messages.append(1) }}",
    "{{ self.__init__.__globals__ }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ strftime_now('%Y') }}",
    "{{ raise_exception('no such roles') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_runs_no_code(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoded, problem = encoded_by(template, tmp_path)
    assert encoded is None
    assert problem.startswith("the chat template does not take it: ")
    assert not (tmp_path / "escaped").exists()


def test_a_template_cannot_read_files(tmp_path):
    (tmp_path / "secret").write_text("x")
    encoded, problem = encoded_by("{% include 'secret' %}", tmp_path)
    assert encoded is None
    assert "does not take it" in problem


def test_a_template_that_writes_the_last_turn_otherwise_is_refused(tmp_path):
    only_last = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    _, problem = encoded_by(only_last, tmp_path)
    assert "message 2 is written otherwise when it is the last one" in problem


def test_tokenizers_without_a_template_or_with_a_broken_one(tmp_path):
    chat = {"messages": CHATS[0]}
    none = tokenizer_with(tmp_path / "none", None)
    with pytest.raises(SettingsError, match=r"no chat template.*chat_template\.jinja"):
        prepared_of(tmp_path, none, chat)
    broken = tokenizer_with(tmp_path / "broken", "{% for %}")
    with pytest.raises(SettingsError, match="chat template .* cannot be read"):
        prepared_of(tmp_path, broken, chat)


def test_another_template_is_another_store(tokenizer, tmp_path):
    chat = {"messages": CHATS[0]}
    first = prepared_of(tmp_path, tokenizer, chat).stores[0].folder
    assert prepared_of(tmp_path, tokenizer, chat).stores[0].folder == first
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE.replace(": ", " - "))
    assert prepared_of(tmp_path, tokenizer, chat).stores[0].folder != first


def test_few_chats_are_kept_for_validation_as_a_whole(tokenizer, tmp_path):
    chats = [{"messages": messages_of(f"question {n} " * 200, "answer")} for n in range(5)]
    store = prepared_of(tmp_path, tokenizer, *chats, validation_fraction=0.01).stores[0]
    assert (store.train.documents, store.validation.documents) == (4, 1)
