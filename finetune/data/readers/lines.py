"""One line of JSON, and the fields that a row of data must have."""

import json

from jam.errors import DataError


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object whose keys are all different. Raises DataError: which of two was meant cannot be known."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"key {twice[:40]!r} is there twice; once is required, remove one of the two")
    return found


def parse_line(raw: bytes, number: int) -> dict | None:
    """The object of line ``number`` (from 1); None for a blank line. Raises DataError without file and line."""
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        if not line.strip():
            return None
        row = json.loads(line, object_pairs_hook=_once)
        if "\\ud" in line.lower():  # half of a surrogate pair, escaped, is JSON and no text
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON ({error.msg} at column {error.colno}); mend or remove the line") from None
    except UnicodeError as error:
        raise DataError(f"not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless nesting
        raise DataError(f"not usable JSON ({error}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise DataError("expected a JSON object")
    return row


def text_field(row: dict, *keys: str) -> str:
    """The first of the keys that is there. Raises DataError when none is, or what is there is not text."""
    key = next((key for key in keys if row.get(key) is not None), keys[0])
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise DataError(f"field {' or '.join(map(repr, keys))} is missing or not text; each line needs it")
    return row[key]
