"""Values of config.json's `quantization_config`: of the kind that is expected, or refused in a sentence."""

import re
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError


def object_of(what: str, value: Any) -> Mapping[str, Any]:
    """An object; None and nothing count as one without entries.

    Raises:
        ConfigError: another kind of value.
    """
    if value is None or value == "" or value == []:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"quantization_config has {what} {value!r}; expected an object.")
    return value


def names_of(what: str, value: Any) -> list[str]:
    """A list of names; None counts as an empty one.

    Raises:
        ConfigError: another kind of value.
    """
    found = [] if value is None else value
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"quantization_config has {what} {value!r}; expected a list of names.")
    return list(found)


def pattern_of(text: str) -> str:
    """A regular expression, as it is.

    Raises:
        ConfigError: it is none.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"quantization_config has the pattern {text!r}, which is no regular expression ({error})."
        ) from None
    return text


def size_of(what: str, value: Any) -> int:
    """A group's columns: a positive number, or -1 for whole rows, which is 0 here.

    Raises:
        ConfigError: another value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value == 0 or value < -1:
        raise ConfigError(f"quantization_config has {what} {value!r}; expected a positive number or -1.")
    return max(0, value)


def one_of(what: str, value: Any, known: tuple[Any, ...]) -> Any:
    """One of some names or numbers.

    Raises:
        ConfigError: another value.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in known:
        expected = ", ".join(map(repr, known))
        raise ConfigError(f"quantization_config has {what} {value!r}; implemented are {expected}.")
    return value
