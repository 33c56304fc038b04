"""The record format of a source, as the settings choose it."""

from collections.abc import Callable

from longfire.config import settings
from longfire.data.chat import Chats
from longfire.data.field_parts import FieldParts
from longfire.data.record_format import RecordFormat
from longfire.data.records import Texts
from longfire.data.token_rows import TokenRows
from longfire.errors import SettingsError


def texts(data: settings.Data, text_field: str) -> RecordFormat:
    if set(text_field) & set("[],<"):
        raise SettingsError(
            f"data.text_field = {text_field!r}: one field, or several joined by `+`; loss masks in "
            "brackets, parts and special tokens are written in data.fields"
        )
    if not text_field:
        return Texts()
    return Texts(tuple(text_field.split("+")))


def tokens(data: settings.Data, text_field: str) -> RecordFormat:
    return TokenRows(data.ids_field, data.document_end)


def fields(data: settings.Data, text_field: str) -> RecordFormat:
    return FieldParts(data.fields, data.fields_from_record, data.field_separator)


def chat(data: settings.Data, text_field: str) -> RecordFormat:
    return Chats(data.messages_field)


RECORD_FORMATS: dict[str, Callable[[settings.Data, str], RecordFormat]] = {
    Texts.name: texts,
    TokenRows.name: tokens,
    FieldParts.name: fields,
    Chats.name: chat,
}


def record_format_of(data: settings.Data, name: str, text_field: str) -> RecordFormat:
    """name, text_field: those of the source, "" where none is given: then it is text, or fields
    where data.fields or data.fields_from_record are set. Raises SettingsError."""
    if not name:
        has_fields = bool(data.fields or data.fields_from_record)
        name = FieldParts.name if has_fields else Texts.name
    if name not in RECORD_FORMATS:
        raise SettingsError(
            f"data.record_format = {name!r} is not one of {', '.join(RECORD_FORMATS)}"
        )
    if text_field and name != Texts.name:
        raise SettingsError(
            f"data.text_field = {text_field!r} names the text of a record, and data.record_format "
            f"= {name!r} reads other fields: leave one of them empty for this source"
        )
    return RECORD_FORMATS[name](data, text_field)
