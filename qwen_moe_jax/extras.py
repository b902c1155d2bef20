"""Packages that only some users need, imported where they are used."""

import importlib
from typing import Any

from qwen_moe_jax.errors import MissingExtraError


def extra_module(name: str, extra: str) -> Any:
    """A module of a package that an extra of this one installs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(
            f'{name.split(".")[0]} is not installed; `pip install "qwen-moe-jax[{extra}]"` has it.'
        ) from None
