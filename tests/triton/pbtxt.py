"""Protobuf's text format, as far as config.pbtxt goes, to dictionaries of lists.."""

from __future__ import annotations

import json
import re
from typing import Any

_TOKEN = re.compile(r'\s*(?:#[^\n]*\s*)*("(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]:,])')


def parse(text: str) -> dict[str, list[Any]]:
    """Every field as the list of its values: numbers, strings, enumerations as strings, messages as this."""
    text = re.sub(r"\s*(?:#[^\n]*\s*)*\Z", "", text)
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match, text[at : at + 40]
        tokens.append(match[1])
        at = match.end()
    message = _message(tokens)
    assert not tokens
    return message


def _message(tokens: list[str]) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    while tokens and tokens[0] != "}":
        name = tokens.pop(0)
        assert re.fullmatch("[a-z_]+", name), name
        colon = tokens[0] == ":" and tokens.pop(0)
        assert colon or tokens[0] in "{[", f"{name} needs a colon"
        fields.setdefault(name, []).extend(_values(tokens))
    return fields


def _values(tokens: list[str]) -> list[Any]:
    if tokens[0] != "[":
        return [_value(tokens)]
    tokens.pop(0)
    values = []
    while tokens[0] != "]":
        values.append(_value(tokens))
        assert tokens[0] in ",]"
        if tokens[0] == ",":
            tokens.pop(0)
            assert tokens[0] != "]", "a comma at the end of a list"
    tokens.pop(0)
    return values


def _value(tokens: list[str]) -> Any:
    token = tokens.pop(0)
    if token == "{":
        message = _message(tokens)
        assert tokens.pop(0) == "}"
        return message
    if token.startswith('"'):
        return json.loads(token)
    return int(token) if re.fullmatch("-?[0-9]+", token) else token
