"""Cases of a sweep of which some run by default, and all with `-m slow` beside them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], keep: Callable[[int], bool]) -> list[Any]:
    """The cases as parameters, those slow whose index `keep` does not want by default; a tuple is a value for
    each argument."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if keep(i) else pytest.mark.slow
        )
        for i, case in enumerate(cases)
    ]
