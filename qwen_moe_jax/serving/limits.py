"""What a server takes."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Of requests.

    Attributes:
        sequences: that run or wait; further requests get 429.
        body_bytes: of a request's body; longer ones get 413.
        body_seconds: in which the body has to come; slower ones get 408.
        seconds: that a request may take; longer ones get 408.
        api_key: that clients have to give; None for none.
    """

    sequences: int
    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0
    api_key: str | None = None
