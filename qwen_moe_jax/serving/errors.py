"""Errors as OpenAI's API has them: a status, and one sentence in a JSON object."""

from typing import Any


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        message: one sentence.
        kind: OpenAI's "type".
        parameter: of the request that is wrong, if it is one.
        code: OpenAI's "code".
        retry_after: seconds after which to try again; None for no such header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.parameter, self.code, self.retry_after = parameter, code, retry_after

    def body(self) -> dict[str, Any]:
        """As JSON."""
        found = {"message": self.message, "type": self.kind, "param": self.parameter, "code": self.code}
        return {"error": found}

    def headers(self) -> dict[str, str]:
        """That go with it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def wrong(parameter: str, value: Any, expected: str) -> ApiError:
    """A parameter of another form than expected."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ApiError(400, f"{parameter} is {shown}; expected {expected}.", parameter=parameter)
