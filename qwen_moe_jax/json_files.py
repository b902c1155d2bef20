"""JSON files that must hold an object."""

import json
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import QwenMoeError


def read_json_object(file: Path, error_type: type[QwenMoeError]) -> dict[str, Any]:
    """The object in a file that exists.

    Raises:
        error_type: it is not JSON, or another kind of value.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise error_type(f"{file} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise error_type(f"{file} holds a JSON {type(value).__name__}; expected an object.")
    return value
