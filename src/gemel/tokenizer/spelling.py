"""How a byte-level vocabulary writes bytes: each as one printable character (Radford et al. 2019, GPT-2)."""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + index) for index, byte in enumerate(_REST)}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def spell(token: bytes) -> str:
    """`token` as the vocabulary writes it."""
    return "".join(map(CHARACTERS.__getitem__, token))


def unspell(token: str) -> bytes:
    """The bytes that a vocabulary entry stands for. An added token with characters that spell no byte is written as it reads."""
    try:
        return bytes([BYTES[character] for character in token])
    except KeyError:
        return token.encode()
