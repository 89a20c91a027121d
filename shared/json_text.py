"""JSON as people write it into data files, read strictly."""

import json
from typing import Any

from shared.errors import RecordError


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        RecordError: it is not UTF-8, not JSON, nested too deeply, or has a key twice.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        return json.loads(decoded, object_pairs_hook=_object, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise RecordError(
            f"{where}: not JSON: {error}", next_step="give one object on each line, or one array of objects"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Where a key stands twice Python would let the last one win in silence."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return fields


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def require_whole_characters(value: Any, where: str) -> None:
    r"""JSON can spell half a surrogate pair (\ud83e), which is no character: no digest, tokenizer or Parquet takes it.

    Raises:
        RecordError: there is one in the value.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError(f"{where}: holds half a surrogate pair, which is no character") from None
    except RecursionError as error:
        raise RecordError(f"{where}: nested too deeply: {error}") from None
