"""Says at a script's start what it needs and is not installed, instead of failing after minutes."""

import importlib.util
import sys


def need(*modules: str) -> None:
    """Ends the program with one sentence if a module cannot be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        sys.exit(f'{sys.argv[0]} needs {names}; run `pip install -e ".[test,bench]"` in the repository.')
