"""What is personal data, what only looks like it, and that no text takes long."""

from __future__ import annotations

import random
from ipaddress import IPv4Address

import pytest

from gemel.config.data.rules import PII_RULES, PiiConfig
from gemel.data.steps.pii import Pii as Redact
from gemel.data.steps.pii import find
from tests.data.steps.prose import chinese, english, kept

FOUND = {
    "email": ["ann@example.org", "a.b+c_d@mail.foo-bar.co.uk", "王写信到zhang.san@qq.com。", "<x_1@ab.io>", "（bob@corp.cn）"],
    "china_id": ["11010519491231002X", "身份证号：11010519491231002x，", "440524188001010014"],
    "bank_card": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "3782 822463 10005",
        "卡号6225880137706868，",
        "30569309025904",
    ],
    "ipv6": ["2606:4700:4700::1111", "at 2a00:1450:4001:81b:0:0:0:200e, and", "[2a00:1450::200e]:80"],
    "ipv4": ["93.184.216.34", "from 93.184.216.34:8080", "（114.114.114.114）", "地址是93.184.216.34。"],
    "phone": [
        "13812345678",
        "电话138-1234-5678。",
        "+86 138 1234 5678",
        "8613812345678",
        "010-62345678",
        "(0755) 26543210",
        "（０２１）５８８８６６６６",
        "0571-87654321-802",
        "400-820-8820",
        "１３８１２３４５６７８",
        "(206) 555-0123",
        "206-555-0123",
        "+1 206.555.0123",
        "+44 20 7946 0958",
        "+442079460958",
        "+49 (30) 901820 55",
    ],
}
LEFT = [
    "icon@2x.png",
    "@handle and user@localhost and a @ b.com",
    "110105194912310021",  # wrong check digit
    "11010519491331002X",  # month 13
    "01010519491231002X",  # no such province
    "4111111111111112",  # wrong Luhn digit
    "9111111111111111",  # no issuer
    "41111111111111111111111",
    "4.111111111111111",
    "10.0.0.1, 192.168.1.1, 127.0.0.1, 169.254.1.1, 255.255.255.255",
    "1.2.3.4, 8.8.8.8, v93.184.216.34, version 10.20.30.40, 版本 93.184.216.34, Chrome/93.184.216.34, 93.184.216.34.5",
    "256.300.1.1 and 93.184.216",
    "12:30:45, a::b, std::vector, aa:bb:cc:dd:ee:ff, 2001:db8::1, ::1, fe80::1, dead::beef",
    "2019-11-20, 20191120, 2019.11.20 12:30:45, 1999/12/31",
    "3.14159265358979, 12345678901, 1,234,567,890, 200 300 4000",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "f47ac10b-58cc-4372-a567-0e02b2c3d479",
    "1625097600000, 1625097600",
    "ISBN 978-7-111-12138-2, 0-306-40615-2",
    "12 345 678 901, +10000000 users, C++11, 1+1=2",
    "138123456789, 1381234567, 10812345678",
]


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in FOUND.items() for text in texts])
def test_found(rule, text):
    found = find(f"see {text} ok", PII_RULES)
    assert [name for *_, name in found] == [rule]


@pytest.mark.parametrize("text", LEFT)
def test_left(text):
    assert find(text, PII_RULES) == []


def test_all_public_addresses_and_no_others():
    draw = random.Random(0)
    for _ in range(300):
        address = IPv4Address(draw.getrandbits(32))
        assert bool(find(f"host {address} up", ("ipv4",))) == (address.is_global and max(address.packed) >= 10)
        assert bool(find(f"host {address} up", ("ipv4",), public_only=False)) == (max(address.packed) >= 10)


def test_private_addresses_if_asked():
    found = find("fe80::1 fd00::1 ::1 10.0.0.12 a::b", PII_RULES, public_only=False)
    assert [rule for *_, rule in found] == ["ipv6", "ipv6", "ipv6", "ipv4"]


def test_replaced_and_counted():
    document = kept(
        Redact(PiiConfig()), "Ann: ann@x.org, bob@x.org; 手机１３８１２３４５６７８，身份证11010519491231002X。Host 93.184.216.34."
    )
    assert document.text == "Ann: email@example.com, email@example.com; 手机<PHONE_NUMBER>，身份证<ID_NUMBER>。Host 192.0.2.1."
    assert document.metadata["counts"] == {"pii.email": 2, "pii.phone": 1, "pii.china_id": 1, "pii.ipv4": 1}
    again = kept(Redact(PiiConfig(rules=("ipv4", "phone", "china_id", "bank_card", "ipv6"))), document.text)
    assert again.text == document.text


def test_rules_and_replacements_are_chosen():
    chosen = Redact(PiiConfig.parse({"rules": ["email"], "replacements": {"email": "[mail]"}}))
    assert kept(chosen, "ann@x.org 13812345678").text == "[mail] 13812345678"


def test_prose_is_left_as_it_is():
    for text in (english(), chinese()):
        document = kept(Redact(PiiConfig()), text)
        assert document.text == text
        assert document.metadata == {}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["1", "1.", ":", "a:", "+1 ", "1-", "(", "a.-", "@", "a@", "a@a.", "1@", "4 ", "(1) ", "0.0.0.0.", "１"])
def test_no_text_takes_long(piece):
    # Quadratic work on 400,000 characters would take minutes.
    assert isinstance(find(piece * (400_000 // len(piece)) + "a@", PII_RULES), list)
