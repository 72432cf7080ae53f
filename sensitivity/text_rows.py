"""Rows of a text or jsonl file, one at a time and checked. Front: imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from sensitivity.contexts import CLASS
from sensitivity.errors import BadCalibration
from sensitivity.spec import Json

MOST_LINE_BYTES = 16 * 2**20
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (torch.save or npz)",
    b"\x93NUMPY": "a npy file",
    **{bytes((0x80, protocol)): "a pickle" for protocol in range(2, 6)},
}


def refuse_foreign(start: bytes) -> None:
    """Raises BadCalibration when a file starts like a pickle, a zip archive or a npy file."""
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise BadCalibration(
                f"calibration data must be text or safetensors. Got {what}. "
                "Save tensors with safetensors.torch.save_file."
            )


Row = str | list[dict[str, str]]


def iterate_rows(file: Path, kind: str) -> Iterator[Row]:
    """The texts (or lists of messages) of a file, one row at a time. Raises BadCalibration naming the row."""
    for row, _ in iterate_contexts(file, kind):
        yield row


def iterate_contexts(file: Path, kind: str) -> Iterator[tuple[Row, str | None]]:
    """As `iterate_rows`, each with the context that the row names; all rows name one or none does."""
    rows = 0
    named = False
    for number, line in _lines(file):
        if line.strip():
            row, context = (line, None) if kind == "text" else _jsonl_row(number, line)
            if rows and (context is not None) != named:
                raise BadCalibration(f'every row or none must have a "context". Got row {number} otherwise.')
            named = context is not None
            rows += 1
            yield row, context
    if rows == 0:
        raise BadCalibration(f"{file.name} must hold at least one row of text. Got an empty file.")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        refuse_foreign(stream.read(8))
        stream.seek(0)
        number = 0
        while raw := stream.readline(MOST_LINE_BYTES):
            number += 1
            if len(raw) >= MOST_LINE_BYTES:
                raise BadCalibration(f"row {number} must be shorter than {MOST_LINE_BYTES} bytes.")
            yield number, _decoded(number, raw)


def _decoded(number: int, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadCalibration(f"row {number} must be UTF-8. Got {error}.") from None
    if "\0" in text:
        raise BadCalibration(f"row {number} must be text. Got a NUL character.")
    return text


def _jsonl_row(number: int, line: str) -> tuple[Row, str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadCalibration(f"row {number} must be a JSON object. Got {error!s:.200}.") from None
    if not isinstance(row, Mapping) or ("text" in row) == ("messages" in row):
        raise BadCalibration(f'row {number} must be an object with either "text" or "messages".')
    content = _text_of(number, row["text"]) if "text" in row else _messages_of(number, row["messages"])
    return content, _context_of(number, row.get("context"))


def _require_encodable(number: int, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadCalibration(f"row {number} must be Unicode text. Got {error}.") from None
    return text


def _text_of(number: int, text: Json) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadCalibration(f'"text" of row {number} must be a string that is not empty. Got {text!r:.80}.')
    return _require_encodable(number, text)


def _context_of(number: int, context: Json) -> str | None:
    if context is None:
        return None
    name = str(context) if isinstance(context, str) or type(context) is int else ""
    if not CLASS.fullmatch(name):
        raise BadCalibration(
            f'"context" of row {number} must be a name of up to 64 letters, digits, spaces and . + / -. '
            f"Got {context!r:.80}."
        )
    return name


def _messages_of(number: int, messages: Json) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadCalibration(f'"messages" of row {number} must be a list that is not empty.')
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise BadCalibration(f'each message of row {number} must have a "role" and a "content" string.')
    return [
        {key: _require_encodable(number, message[key]) for key in ("role", "content")} for message in messages
    ]
