"""Languages of sentences of known language, the rule for scripts, and what is kept and dropped."""

from __future__ import annotations

import pytest

from gemel.config.data.rules import LanguageConfig
from gemel.config.errors import ConfigError
from gemel.data.steps.language import Language
from tests.data.steps.prose import chinese, kept, reason

# Article 1 of the Universal Declaration of Human Rights.
SENTENCES = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
}
LANGUAGE = Language(LanguageConfig())


@pytest.mark.parametrize("code", sorted(SENTENCES))
def test_sentences(code):
    document = kept(LANGUAGE, SENTENCES[code])
    assert document.metadata["language"] == code
    assert 0.65 <= document.metadata["language_score"] <= 1.0


@pytest.mark.parametrize("text", ["谢谢", "上海外滩", "今天天氣很好", "第3章：结论", chinese(2), "使用 Python 编写程序"])
def test_short_han_is_chinese_by_its_script(text):
    assert LANGUAGE.identify(text)[0] == "zh"


def test_a_few_kana_make_it_japanese():
    assert LANGUAGE.identify("東京都の人口")[0] == "ja"


def test_mixed_text_is_in_the_language_of_most_of_it():
    assert LANGUAGE.identify(SENTENCES["en"] * 5 + SENTENCES["zh"])[0] == "en"
    assert LANGUAGE.identify(SENTENCES["zh"] * 5 + " Hello")[0] == "zh"


def test_text_without_letters_is_undetermined():
    for text in ("", " ", "12:30 - 14:00", "!!!"):
        assert LANGUAGE.identify(text) == ("und", 0.0)
    assert reason(LANGUAGE, "2024-01-01") == "language.uncertain"


def test_long_texts_are_read_from_all_over():
    assert LANGUAGE.identify("x1 " * 500 + SENTENCES["fr"] * 2000)[0] == "fr"


def test_lines_and_lone_surrogates_do_no_harm():
    assert LANGUAGE.identify(SENTENCES["de"].replace(" ", "\n") + "\ud800")[0] == "de"


def test_what_is_kept():
    only = Language(LanguageConfig(keep=("zh", "en")))
    assert reason(only, SENTENCES["fr"]) == "language.other"
    assert reason(only, SENTENCES["zh"]) == ""
    but = Language(LanguageConfig(drop=("fr",)))
    assert reason(but, SENTENCES["fr"]) == "language.other"
    assert reason(but, SENTENCES["de"]) == ""


def test_lists_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="exclude each other"):
        LanguageConfig.parse({"keep": ["en"], "drop": ["fr"]})


def test_without_a_second_opinion_fasttext_decides_alone():
    alone = Language(LanguageConfig(second_opinion=False))
    assert alone.identify(SENTENCES["en"])[0] == "en"
