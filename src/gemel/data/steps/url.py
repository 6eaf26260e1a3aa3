"""Documents that are not wanted for where they come from: domains, single addresses, patterns.

A domain stands for all of its subdomains, so a look-up walks the host name from its whole to its last label: as many set look-ups as it has
labels, whatever the length of the list. No table of public suffixes is needed for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gemel.config.data.rules import UrlConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped

_HOSTS_FILE = re.compile(r"^(?:0\.0\.0\.0|127\.0\.0\.1|::1?)\s+")


class Url:
    """Drops documents by their address."""

    def __init__(self, config: UrlConfig):
        listed = [line for file in config.domain_files for line in _lines(file)]
        self._domains = frozenset(_host(domain) for domain in (*config.domains, *listed))
        self._urls = frozenset(_bare(line) for file in config.url_files for line in _lines(file))
        try:
            self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in config.patterns]
        except re.error as error:
            raise ConfigError(f"patterns: {error.pattern!r} is no regular expression: {error}") from None

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""
        for document in documents:
            url = _url_of(document)
            reason = self._reason(url) if url else None
            yield Dropped(document, *reason) if reason else document

    def _reason(self, url: str) -> tuple[str, str] | None:
        host = _host(url)
        while host:
            if host in self._domains:
                return "url.domain", host
            host = host.partition(".")[2]
        if self._urls and (bare := _bare(url)) in self._urls:
            return "url.listed", bare
        for pattern in self._patterns:
            if pattern.search(url):
                return "url.pattern", pattern.pattern
        return None


def _url_of(document: Document) -> str:
    url = document.metadata.get("url")
    if isinstance(url, str):
        return url
    return document.id if "://" in document.id else ""


def _lines(file: Path) -> Iterator[str]:
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the list {file}: {error.strerror}") from None
    for line in text.splitlines():
        entry = _HOSTS_FILE.sub("", line.partition("#")[0].strip())
        if entry:
            yield entry


def _host(url: str) -> str:
    """The host name in lower case and in the form that DNS sees (IDNA), without user and port; works for bare domains too."""
    try:
        host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:  # an unclosed bracket, as of an IPv6 address
        return ""
    host = host.strip(".")
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host


def _bare(url: str) -> str:
    """One spelling for addresses that lead to the same page."""
    rest = url.partition("://")[2] or url
    return rest.partition("#")[0].removeprefix("www.").rstrip("/").lower()
