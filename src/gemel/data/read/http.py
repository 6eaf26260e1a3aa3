"""HTTP/1 responses as web archives keep them: head and body, with the codings of transfer and content undone (RFC 9112, RFC 9110)."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

CHUNK_HEAD = re.compile(rb"\r?\n?([0-9a-fA-F]+)[^\n]*\n")


@dataclass(frozen=True, slots=True)
class Response:
    """What a server sent, body decoded."""

    status: int
    content_type: str
    body: bytes


def response(data: bytes, max_bytes: int) -> Response | tuple[str, str]:
    """The response, or the reason and detail for which it cannot be read."""
    end = re.search(rb"\r?\n\r?\n", data)
    head, body = (data[: end.start()], data[end.end() :]) if end else (data, b"")
    status_line, *lines = head.decode("latin-1").splitlines() or [""]
    status = re.match(r"HTTP/[\d.]+ +(\d{3})", status_line)
    if not status:
        return "read.broken_record", f"not an HTTP response: {status_line[:80]!r}"
    headers = {name.strip().lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = unchunked(body)
    for coding in reversed([part.strip().lower() for part in headers.get("content-encoding", "").split(",")]):
        decoded = _decoded(body, coding, max_bytes)
        if isinstance(decoded, tuple):
            return decoded
        body = decoded
    return Response(int(status[1]), headers.get("content-type", ""), body)


def unchunked(data: bytes) -> bytes:
    """The body in a chunked message. What does not look so is returned as it is: some archivers undo the coding and keep the header."""
    parts: list[bytes] = []
    at = 0
    while head := CHUNK_HEAD.match(data, at):
        size = int(head[1], 16)
        if size == 0:
            return b"".join(parts)
        at = head.end() + size
        if at > len(data):
            return b"".join([*parts, data[head.end() :]]) if parts else data
        parts.append(data[head.end() : at])
    return b"".join(parts) if parts else data


def _decoded(data: bytes, coding: str, max_bytes: int) -> bytes | tuple[str, str]:
    if coding in ("", "identity", "none"):
        return data
    if coding not in ("gzip", "x-gzip", "deflate"):
        return "read.content_encoding", coding
    if coding != "deflate" and not data.startswith(b"\x1f\x8b"):
        return data  # undone already by the archiver
    for wbits in (31,) if coding != "deflate" else (15, -15):  # deflate should be zlib's frame, but some servers send the bare stream
        decoder = zlib.decompressobj(wbits)
        try:
            out = decoder.decompress(data, max_bytes + 1)
        except zlib.error:
            continue
        if len(out) > max_bytes:
            return "read.too_long", f"unpacks to more than max_document_bytes = {max_bytes}"
        return out
    return "read.broken_record", f"Content-Encoding is {coding}, but the body is not"
