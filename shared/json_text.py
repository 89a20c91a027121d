"""JSON as people write it into data files, read strictly."""

import json
from typing import Any

from shared.errors import RecordError


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        RecordError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise RecordError(f"{where}: not JSON: {error}") from None


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
