"""Makes a corpus with known near-duplicates from what lies on any Linux machine: manuals, package documentation, texts of Python packages.

    python bench/corpus.py OUT.jsonl [--documents 18000] [--copies 500] [--seed 0] [ROOT ...]

Documents are files of 500 to 20,000 characters, no two with the same text, in random order. Of some, a copy is planted in which a share of
the words (0.5, 1, 2 and 5 percent, `--copies` of each) was replaced by a word of another document, deleted, or joined by one, each with the
same probability. A copy's metadata say what it is: {"copy_of": id, "edits": share}.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOTS = ("/usr/share/doc", "/usr/share/man", "/usr/share/info", sysconfig.get_path("purelib"))
SUFFIXES = re.compile(
    r"\.(txt|md|rst|html?|info|texi|tex|[1-9][a-z]*|log|copyright|README|NEWS|Debian)$|/(copyright|README|NEWS|changelog)[^/]*$"
)
EDITS = (0.005, 0.01, 0.02, 0.05)
LEAST_CHARS, MOST_CHARS = 500, 20_000


def read(path: Path) -> str | None:
    """The text of a file, if it is one."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    return text if LEAST_CHARS <= len(text) <= MOST_CHARS and "\0" not in text else None


def texts(roots: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Paths and texts, each text once."""
    seen = set()
    for root in roots:
        for path in sorted(Path(root).rglob("*")):
            if not SUFFIXES.search(str(path).removesuffix(".gz")) or not path.is_file():
                continue
            text = read(path)
            digest = hashlib.blake2b((text or "").encode(), digest_size=16).digest()
            if text and digest not in seen:
                seen.add(digest)
                yield str(path), text


def edited(text: str, share: float, words: list[str], draw: random.Random) -> str:
    """`text` with so many of its words changed, at least one; white space stays as it is."""
    parts = re.split(r"(\s+)", text)
    places = [i for i in range(0, len(parts), 2) if parts[i]]
    for i in draw.sample(places, max(1, round(share * len(places)))):
        match draw.randrange(3):
            case 0:
                parts[i] = draw.choice(words)
            case 1:
                parts[i] = ""
            case _:
                parts[i] += " " + draw.choice(words)
    return "".join(parts)


def main() -> None:
    """Write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("roots", nargs="*", default=ROOTS, metavar="ROOT")
    parser.add_argument("--documents", type=int, default=18_000)
    parser.add_argument("--copies", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    found = list(texts(args.roots))
    if len(found) < args.documents:
        parser.error(
            f"{len(found)} files of {LEAST_CHARS} to {MOST_CHARS} characters were found; set --documents {len(found)}, or give more roots"
        )
    originals = draw.sample(found, args.documents)
    words = [word for _, text in draw.sample(originals, min(200, len(originals))) for word in text.split()]
    rows = [{"text": text, "id": name, "metadata": {}} for name, text in originals]
    sources = draw.sample(rows, len(EDITS) * args.copies)
    for i, row in enumerate(sources):
        share = EDITS[i % len(EDITS)]
        metadata = {"copy_of": row["id"], "edits": share}
        rows.append({"text": edited(row["text"], share, words, draw), "id": f"copy-{i}", "metadata": metadata})
    draw.shuffle(rows)
    with args.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} documents, {sum(len(row['text']) for row in rows) / 1e6:.1f} M characters, of {len(found)} files")


if __name__ == "__main__":
    main()
