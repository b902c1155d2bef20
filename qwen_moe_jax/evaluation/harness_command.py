"""`qwen-moe-jax lm-eval ...`: EleutherAI's command line with this library's model in it."""

import sys
from collections.abc import Sequence

from qwen_moe_jax.errors import MissingExtraError


def run_harness(arguments: Sequence[str]) -> int:
    """Hands arguments to the harness; returns the exit status.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise MissingExtraError(
            'lm_eval is not installed; `pip install "qwen-moe-jax[eval]"` has it.'
        ) from None
    import lm_eval.models  # noqa: F401  so that its own models are known, too

    import qwen_moe_jax.evaluation.harness  # noqa: F401  registers the model

    sys.argv = ["lm_eval", *arguments]  # where the harness reads them
    cli_evaluate()
    return 0
