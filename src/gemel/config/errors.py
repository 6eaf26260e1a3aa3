"""The errors that users see, drawn as a tree.

Every one of them is a `ValueError`, because what it reports is a value that somebody chose. Each message gives the value, the limit and a
way out. A failed `assert` is a bug of ours and is never caught.

    GemelError
    ├── ConfigError        a setting is wrong or two settings contradict each other
    ├── UnsupportedError   a checkpoint or a request asks for something that is not built; says what is
    ├── CheckpointError    a file is missing, truncated or not what it claims to be
    ├── RankError          one of several processes died or hangs, which ends all of them
    ├── RequestError       one request is refused (HTTP 400); `param` names the field
    └── CapacityError      the request is fine, there is no room for it now (HTTP 503)
"""

from __future__ import annotations


class GemelError(ValueError):
    """The root: catch this to catch everything that a user can cause."""


class ConfigError(GemelError):
    """A setting is wrong, or two settings contradict each other."""


class UnsupportedError(GemelError):
    """Something was asked for by name that is not built here."""


class CheckpointError(GemelError):
    """A checkpoint file is missing, truncated, or not what it claims to be."""


class RankError(GemelError):
    """One of the processes of a job died, failed or hangs, and the message names it. What was saved is whole: the job can go on from it."""


class RequestError(GemelError):
    """One request is refused. `param` is the field at fault, in the caller's spelling."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class CapacityError(GemelError):
    """The request is valid but cannot be taken now: the queue is full or the server is draining."""
