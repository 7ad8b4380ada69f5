"""Names from outside, fit for a line of a terminal. Knows characters only."""

from __future__ import annotations

import unicodedata

# Controls (and with them ESC), formats (which turn the direction of what follows), halves, ends of lines.
_HARMFUL = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # without which words of some scripts, and some emoji, fall apart


def escaped(text: str) -> str:
    """`text` as one line that a terminal shows and does not obey: `\\n`, `\\x1b`, `\\u202e`, `\\xff`.

    A byte of a file's name that is no text, which Python holds as half a character, is shown as the byte.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _HARMFUL else c for c in text)


def _escaped(character: str) -> str:
    if character in _JOINERS:
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
