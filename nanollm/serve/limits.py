"""How much may one request ask for, and how long may it take?

Each limit is a promise to the other requests: whoever exceeds it gets a clear answer, and nobody else waits for it.
"""

import ipaddress
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server allows."""

    max_running: int = 16
    """Replies that are written at once; each has a row of the cache."""
    max_waiting: int = 64
    """Replies that may wait for a row; beyond that the server answers 429."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt; null: the model's context, less one for the reply."""
    max_tokens: int = 4096
    """Most tokens of a reply that a request may ask for."""
    max_n: int = 8
    """Most replies (n) to one prompt."""
    max_stop: int = 4
    """Most stop texts of a request."""
    max_messages: int = 1000
    """Most messages of a conversation."""
    max_body_bytes: int = 1_048_576
    """Most bytes of a request's body."""
    body_timeout_s: float = 10.0
    """Seconds until a request's body must have arrived."""
    deadline_s: float = 300.0
    """Seconds until a reply must be complete."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins of other pages that may call the server from a browser, such as http://localhost:3000."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_tokens", "max_n", "max_stop", "max_messages", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting must be at least 0, got {self.max_waiting}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, got {self.max_prompt_tokens}")
        for name in ("body_timeout_s", "deadline_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name} must be above 0 seconds and below a million, got {getattr(self, name)}")
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
