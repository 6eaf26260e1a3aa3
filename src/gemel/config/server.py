"""Where the server listens, who may use it, and how much one caller may ask of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from gemel.config.base import Config


class ServerConfig(Config):
    """Limits of one HTTP server. The defaults are safe on a shared machine: loopback only, everything bounded.

    host            address to listen on; 0.0.0.0 lets other machines in, and then wants an api_key
    port            0 takes a free one
    api_key         guards every route but /health; None leaves the server open to whoever reaches the port
    allowed_hosts   names under which browsers may reach the server, beside the address it listens on (see `server.guard`)
    max_body_bytes  largest request body and WebSocket message
    max_head_bytes  largest request line and headers together
    max_outputs     prompts of one call times its n (or beam_width)
    read_timeout_s  a client that has not sent its head, or then its body, within this time is let go
    keep_alive_s    a stream that is silent for this long sends a comment, so that proxies keep it open
    drain_s         after the first SIGTERM or Ctrl-C running requests have this long to finish
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: PositiveInt = 2_000_000
    max_head_bytes: PositiveInt = 65_536
    max_outputs: PositiveInt = 128
    read_timeout_s: PositiveFloat = 30.0
    keep_alive_s: PositiveFloat = 15.0
    drain_s: NonNegativeFloat = 30.0

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, key: str | None) -> str | None:
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError("holds characters that no HTTP header can carry; use printable ASCII without spaces at the ends")
        return key
