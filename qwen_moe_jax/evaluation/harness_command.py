"""`qwen-moe-jax lm-eval ...`: EleutherAI's command line with this library's model in it."""

import sys
from collections.abc import Sequence

from qwen_moe_jax.extras import extra_module


def run_harness(arguments: Sequence[str]) -> int:
    """Hands arguments to the harness; returns the exit status.

    Raises:
        MissingExtraError: it is not installed.
    """
    cli_evaluate = extra_module("lm_eval.__main__", "eval").cli_evaluate
    import lm_eval.models  # noqa: F401  so that its own models are known, too

    import qwen_moe_jax.evaluation.harness  # noqa: F401  registers the model

    sys.argv = ["lm_eval", *arguments]  # where the harness reads them
    cli_evaluate()
    return 0
