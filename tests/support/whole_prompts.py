"""A deployment whose prefill step reads every row whole at once, where the engine reads one row a rank."""

import dataclasses
from typing import Any

from qwen_moe_jax.aot.compile import make_deployment
from qwen_moe_jax.aot.programs import Deployment


class WholePrompts(Deployment):
    """All rows, each to the end of its room."""

    def step_rows(self, program: str) -> int:
        """All."""
        return self.rows

    def step_tokens(self, program: str) -> int:
        """As many as a row may hold."""
        return self.context


def whole_prompts(*given: Any, rows: int, tokens: int, **choices: Any) -> WholePrompts:
    """Arguments as of `make_deployment`, whose batch is `rows` and whose context `tokens`."""
    made = make_deployment(*given, batch=rows, context=tokens, **choices)
    return WholePrompts(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})
