"""Addresses are replaced, and what only looks like one is not."""

from __future__ import annotations

import ipaddress
import random
import string
import sysconfig
from pathlib import Path

import pytest

from luban.corpus.document import Document
from luban.corpus.steps.personal import EXAMPLE_ADDRESS, EXAMPLE_EMAIL, personal, scrub
from luban.corpus.tally import Tally


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Write to jane.doe+x@mail.example.co.uk, please.", "Write to someone@example.com, please."),
        ("<a@b.org>", "<someone@example.com>"),
        ("@decorator and a @ b and x@y", "@decorator and a @ b and x@y"),
        ("ping 8.8.8.8 now", "ping 192.0.2.1 now"),
        ("at 8.8.4.4.", "at 192.0.2.1."),
        ("home is 127.0.0.1 or 192.168.1.7 or 10.0.0.1", "home is 127.0.0.1 or 192.168.1.7 or 10.0.0.1"),
        ("loss = (w@x.sum()) and section 8.2.4.44 or v3.1.1.6", "loss = (w@x.sum()) and section 8.2.4.44 or v3.1.1.6"),
        ("from 8.2.4.44 to http://9.9.9.9/x", "from 192.0.2.1 to http://192.0.2.1/x"),
        ("224.0.0.0/4 and 1.0.0.127.in-addr.arpa", "224.0.0.0/4 and 1.0.0.127.in-addr.arpa"),
        ("version 1.2.3.4.5 and 999.1.1.1 and 3.11.7", "version 1.2.3.4.5 and 999.1.1.1 and 3.11.7"),
    ],
)
def test_scrubbing(text, expected):
    assert scrub(text, Tally()) == expected
    assert scrub(expected, Tally()) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("请联系ab.cd@example.com咨询", "请联系someone@example.com咨询"),
        (
            "お問い合わせはab@x.co.jpまで、주소ab@x.kr으로",
            "お問い合わせはsomeone@example.comまで、주소someone@example.com으로",
        ),
        (
            "อีเมลab@x.comครับ कृपयाab@x.comपर العنوانab@x.comهنا",
            "อีเมลsomeone@example.comครับ कृपयाsomeone@example.comपर العنوانsomeone@example.comهنا",
        ),
        ("邮箱ab＠example.com。", "邮箱someone@example.com。"),
        ("地址为8.8.8.8端口80", "地址为192.0.2.1端口80"),
        (
            "请ping 8.8.8.8，服务器是8.8.4.4，サーバーは8.8.8.8です",
            "请ping 192.0.2.1，服务器是192.0.2.1，サーバーは192.0.2.1です",
        ),
        ("版本8.2.4.44，第8.2.4.44节", "版本8.2.4.44，第8.2.4.44节"),
        ("第1章 203.119.1.1端口，内网192.168.1.1端口", "第1章 192.0.2.1端口，内网192.168.1.1端口"),
    ],
)
def test_scripts_without_spaces_end_an_address(text, expected):
    assert scrub(text, Tally()) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ИмейлIvan@example.comработает", "Имейлsomeone@example.comработает"),
        ("на Ivan@example.comили ivan.p@пример.рф.", "на someone@example.comили someone@example.com."),
        ("Γράψτεab@x.grσήμερα", "Γράψτεsomeone@example.comσήμερα"),
        ("user@例え.jp", "someone@example.com"),
        ("a_b+c@例子.中国", "someone@example.com"),
        ("请联系a_b+c@例子.中国咨询，或ab@例え.co.jpまで", "请联系someone@example.com咨询，或someone@example.comまで"),
        ("（用户@例子.公司）", "（someone@example.com）"),
        (
            "ab@उदाहरण.भारत, ab@مثال.مصر: ab@도메인.한국으로",
            "someone@example.com, someone@example.com: someone@example.com으로",
        ),
        ("转发@张三.李四 和ab@张三李四", "转发@张三.李四 和ab@张三李四"),
        ("ab@example.com请访问abc.com", "someone@example.com请访问abc.com"),
    ],
)
def test_internationalised_addresses_and_other_scripts_beside_them(text, expected):
    assert scrub(text, Tally()) == expected
    assert scrub(expected, Tally()) == expected


def test_a_long_run_of_labels_takes_linear_time():
    """Labels of digits alone could be read as of any script: the alternatives must not multiply."""
    text = "a@" + "1." * 3000 + "!" + "a@" + "例." * 3000 + "!" + "а@" + "б1-." * 3000
    assert scrub(text, Tally()) == text


@pytest.mark.parametrize(
    "text",
    [
        "clone git@github.com:user/repo.git or ssh://git@gitlab.com/x",
        "remote git@github.com: is down",
        "scp joe@host.org:/srv/data joe@host.org:~/x",
        "![icon@2x.png](img/icon-60@3x.PNG)",
        "lodash@4.17.21.tgz and vue@3.prod.js",
    ],
)
def test_remotes_and_file_names_are_no_addresses(text):
    assert scrub(text, Tally()) == text


@pytest.mark.parametrize("address", ["müller@bücher.de", "mu\u0308ller@x.de", "почта@пример.рф", "o.k+a%b@x.xn--p1ai"])
def test_letters_outside_ascii_belong_to_an_address(address):
    assert scrub(f"so {address}, yes ..{address}", Tally()) == f"so {EXAMPLE_EMAIL}, yes ..{EXAMPLE_EMAIL}"


@pytest.mark.parametrize(
    "before, after", [("请联系", "咨询"), ("は", "まで"), ("주소", "으로"), ("<", ">"), ("：", "。"), ("โ", "ค")]
)
def test_an_address_is_found_between_any_neighbours(before, after):
    """Nothing but the address is taken, whatever letters of another script touch it."""
    rng = random.Random()
    for _ in range(100):
        local = rng.choice(string.ascii_letters) + "".join(
            rng.choices(string.ascii_letters + string.digits + "._+-", k=rng.randint(0, 12))
        )
        name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
        text = f"{before}{local}@{name}.{rng.choice(['com', 'org', 'co.uk', 'edu.cn'])}{after}"
        assert scrub(text, Tally()) == (f"{before}{EXAMPLE_EMAIL}{after}" if local.lower() != "git" else text), text


def test_tool_calls_are_scrubbed_too():
    call = {"id": "c1", "type": "function", "function": {"name": "mail", "arguments": '{"to": "a@b.org"}'}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sent to a@b.org"},
    ]
    tally = Tally()
    [found] = personal([Document(id="a", text="", source="s", messages=messages)], tally)
    assert found.messages[0]["tool_calls"][0]["function"]["arguments"] == '{"to": "someone@example.com"}'
    assert found.messages[1] == {"role": "tool", "content": "sent to someone@example.com"}
    assert messages[0]["tool_calls"] == [call] and tally.counts == {"emails_replaced": 2}


def test_conversations_are_scrubbed_and_everything_is_counted():
    messages = [{"role": "user", "content": "I am a@b.org"}, {"role": "assistant", "content": "You are at 8.8.8.8"}]
    tally = Tally()
    [found] = personal([Document(id="a", text="unused", source="s", messages=messages)], tally)
    assert found.text == "I am someone@example.com\nYou are at 192.0.2.1"
    assert [m["content"] for m in found.messages] == found.text.split("\n")
    assert tally.counts == {"emails_replaced": 1, "ip_addresses_replaced": 1}


def test_planted_addresses_are_found_and_false_alarms_are_rare():
    """Addresses among what looks like them, one to five; misses and false alarms are printed."""
    rng = random.Random()

    def word(low: int, high: int) -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))

    def numbers(most: int) -> str:
        return ".".join(str(rng.randint(1, most)) for _ in range(4))

    def public() -> str:
        while not (found := ipaddress.IPv4Address(rng.getrandbits(32))).is_global or found.is_multicast:
            pass
        return str(found)

    real = [
        lambda: (
            f"{word(1, 9)}.{word(2, 9)}+{word(1, 3)}@{word(2, 9)}.{rng.choice(['com', 'org', 'co.uk', 'de', 'edu.cn'])}"
        ),
        public,
    ]
    alike = [
        lambda: f"@{word(3, 9)}.{word(3, 9)}",
        lambda: f"{word(1, 3)} @ {word(1, 3)}.T",
        lambda: f"{word(1, 2)}@{word(1, 2)}.mean(0)",
        lambda: f"{word(3, 8)}@{rng.randint(1, 9)}.{rng.randint(0, 9)}.0",
        lambda: f"section {numbers(40)}",
        lambda: f"v{numbers(30)}",
        lambda: f"{word(3, 8)}@{word(3, 8)}:/{word(2, 5)}",
        lambda: f"10.{rng.randint(0, 255)}.0.1",
        lambda: f"{numbers(20)}.{rng.randint(1, 9)}",
        lambda: f"192.168.{rng.randint(0, 255)}.7",
    ]
    missed = alarms = planted = others = 0
    for _ in range(3000):
        if rng.random() < 1 / 6:
            planted += 1
            missed += scrub(f"so {(rng.choice(real))()} it is", Tally()) not in (
                f"so {EXAMPLE_EMAIL} it is",
                f"so {EXAMPLE_ADDRESS} it is",
            )
        else:
            others += 1
            text = f"so {(rng.choice(alike))()} it is"
            alarms += scrub(text, Tally()) != text
    print(f"missed {missed} of {planted}, false alarms {alarms} of {others}")
    assert missed <= 0.02 * planted and alarms <= 0.001 * others


def test_in_the_standard_library_no_section_or_version_is_taken_for_an_address():
    """Files that speak of sections and versions; the one address in them is meant as one."""
    root, tally = Path(sysconfig.get_paths()["stdlib"]), Tally()
    for name in (
        "_markupbase.py",
        "html/parser.py",
        "http/server.py",
        "socket.py",
        "statistics.py",
        "typing.py",
        "ssl.py",
    ):
        scrub((root / name).read_text(encoding="utf-8"), tally)
    assert tally.counts["ip_addresses_replaced"] <= 2  # socket.py explains inet_aton with 123.45.67.89
