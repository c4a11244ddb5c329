"""How much may one request ask for, and how long may it take?

Each limit is a promise to the other requests: whoever exceeds it gets a clear answer, and nobody else waits for it.
"""

import ipaddress
from dataclasses import dataclass, field

MAX_TOKENS = 4096
"""Tokens of a reply that a request may ask for, whatever fits into the model's context."""
MAX_N = 8
MAX_STOPS = 4
MAX_MESSAGES = 1000
BODY_TIMEOUT_S = 10.0
"""Until a request's body must have arrived."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server allows."""

    max_running: int = 16
    """Replies that are written at once; each has a row of the cache."""
    max_waiting: int = 64
    """Replies that may wait for a row; beyond that the server answers 429."""
    max_body_bytes: int = 1_048_576
    """Most bytes of a request's body."""
    deadline_s: float = 300.0
    """Seconds until a reply must be complete."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins of other pages that may call the server from a browser, such as http://localhost:3000."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting must be at least 0, got {self.max_waiting}")
        if not 0 < self.deadline_s < 1e6:
            raise ValueError(f"deadline_s must be above 0 seconds and below a million, got {self.deadline_s}")
        if "*" in self.cors_origins:
            raise ValueError("cors_origins must list origins one by one, got *: any page could use the model")

    @property
    def capacity(self) -> int:
        """Replies that the server takes on at once, running and waiting together."""
        return self.max_running + self.max_waiting


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host's name or address."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
