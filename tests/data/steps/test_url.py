"""Addresses that are listed, in every spelling, and those that only look alike."""

from __future__ import annotations

import pytest

from gemel.config.data.rules import UrlConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps.url import Url


def reason_of(step: Url, url: str) -> str:
    (answer,) = step([Document("text", "7", "test", {"url": url})])
    (by_id,) = step([Document("text", url, "test")])
    assert type(answer) is type(by_id)
    return answer.reason if isinstance(answer, Dropped) else ""


@pytest.mark.parametrize(
    "url",
    [
        "http://bad.com",
        "https://www.bad.com/x?y#z",
        "https://a.b.BAD.com.:8080/",
        "http://user:pw@bad.com/",
        "https://坏.cn/页",
        "http://" + "坏.cn".encode("idna").decode(),
    ],
)
def test_a_domain_stands_for_its_subdomains(url):
    assert reason_of(Url(UrlConfig(domains=("bad.com", "坏.cn"))), url) == "url.domain"


@pytest.mark.parametrize(
    "url", ["http://notbad.com", "http://bad.com.good.org", "http://good.org/bad.com", "http://bad.co", "http://[::1", "x://"]
)
def test_other_hosts_pass(url):
    assert reason_of(Url(UrlConfig(domains=("bad.com",))), url) == ""


def test_lists_from_files(tmp_path):
    domains, urls = tmp_path / "domains.txt", tmp_path / "urls.txt"
    domains.write_text("# list\nspam.com\n0.0.0.0 ads.net # served\n\n")
    urls.write_text("https://www.news.org/page/\n")
    url = Url(UrlConfig(domain_files=(str(domains),), url_files=(str(urls),)))
    assert reason_of(url, "http://x.spam.com/") == reason_of(url, "http://ads.net/a") == "url.domain"
    assert reason_of(url, "http://news.org/page#top") == "url.listed"
    assert reason_of(url, "http://news.org/page/2") == ""


def test_patterns():
    url = Url(UrlConfig(patterns=(r"/tag/", r"\bcasino\b")))
    assert reason_of(url, "http://x.org/Tag/a") == reason_of(url, "http://best-casino.org/") == "url.pattern"
    assert reason_of(url, "http://x.org/vintage") == ""


def test_documents_without_an_address_pass():
    (answer,) = Url(UrlConfig(domains=("com",), patterns=(".",)))([Document("text", "bad.com/1", "test")])
    assert isinstance(answer, Document)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="nowhere"):
        Url(UrlConfig(domain_files=("nowhere.txt",)))
    with pytest.raises(ConfigError, match=r"'\('"):
        Url(UrlConfig(patterns=("(",)))
