"""The chat page clicked through in a real browser."""

from __future__ import annotations

import pytest
from adapted_models import write_adapter
from browser import CHROMIUM, DRIVER
from test_http import KEY, start, stop

from luban.adapters.lora import LoRA

pytest.importorskip("fastapi")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

ENTER, ESCAPE = "\ue007", "\ue00c"


@pytest.fixture(scope="module")
def plain(tiny_checkpoint):
    process, address, _ = start(tiny_checkpoint, "--port", "0")
    yield address
    stop(process)


@pytest.fixture(scope="module")
def locked(tiny_checkpoint):
    process, address, _ = start(tiny_checkpoint, "--port", "0", "--api-key", KEY)
    yield address
    stop(process)


ANSWERED = "document.querySelectorAll('.message.assistant .tools').length"


def open_with_short_answers(browser, address):
    """A random model would fill its context."""
    browser.open(address)
    browser.script("localStorage.setItem('luban.max-tokens', '40')")
    browser.open(address)
    browser.until("document.getElementById('model').textContent.startsWith('tiny-bytes')")


def test_a_conversation(browser, plain):
    open_with_short_answers(browser, plain)
    browser.type("#input", "<b>hello</b>" + ENTER)
    browser.until(f"{ANSWERED} == 1")
    assert browser.script("document.querySelector('.message.user .text').textContent") == "<b>hello</b>"
    assert browser.script("document.querySelectorAll('.message b').length") == 0  # text stays text
    browser.until("document.activeElement.id == 'input'")
    browser.type("#input", "again")
    browser.click("#send")
    browser.until(f"{ANSWERED} == 2")
    assert browser.script("state.messages.map(m => m.role).join()") == "user,assistant,user,assistant"
    shown = browser.script("[...document.querySelectorAll('.message .text')].map(m => m.textContent)")
    browser.open(plain)  # a reload keeps the conversation
    browser.until(f"{ANSWERED} == 2")
    assert browser.script("[...document.querySelectorAll('.message .text')].map(m => m.textContent)") == shown
    assert browser.script("state.messages.map(m => m.role).join()") == "user,assistant,user,assistant"
    assert browser.script("document.querySelectorAll('.message b').length") == 0
    browser.click("#new")
    browser.until("!document.querySelector('.message') && !document.getElementById('welcome').hidden")
    browser.open(plain)
    browser.until("state.model")
    assert browser.script("document.querySelectorAll('.message').length") == 0
    assert [line for line in browser.log() if "favicon" not in line] == []  # no error, nothing refused by the policy


def test_settings_reach_the_request_and_survive_a_reload(browser, plain):
    browser.open(plain)
    browser.until("state.model")
    browser.click("#open-settings")
    browser.script("document.getElementById('max-tokens').value = ''")
    browser.type("#max-tokens", "3")
    browser.type("#system", "be brief")
    browser.script(
        "(t => { t.value = 0; t.dispatchEvent(new Event('input')) })(document.getElementById('temperature'))"
    )
    browser.type("#system", ESCAPE)
    browser.until("document.getElementById('settings').hidden")
    body = browser.script("requestFor([{role: 'user', content: 'x'}])[1]")
    assert (body["max_tokens"], body["temperature"]) == (3, 0)
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    browser.open(plain)
    assert browser.script("document.getElementById('max-tokens').value") == "3"
    theme = browser.script("document.documentElement.dataset.theme")
    browser.click("#theme")
    assert browser.script("document.documentElement.dataset.theme") != theme


def test_what_is_not_set_is_left_to_the_models_own_settings(browser, plain):
    browser.open(plain)
    browser.until("state.model")
    asked = "requestFor([{role: 'user', content: 'x'}])[1]"
    assert sorted(browser.script(asked)) == ["messages", "model", "stream", "stream_options"]
    assert browser.script("document.getElementById('temperature-value').textContent") == "the model's own"
    slider = "document.getElementById('temperature')"
    browser.script(f"(t => {{ t.value = 1.5; t.dispatchEvent(new Event('input')) }})({slider})")
    assert browser.script(asked)["temperature"] == 1.5
    browser.script(f"{slider}.dispatchEvent(new Event('dblclick'))")
    assert "temperature" not in browser.script(asked)


def test_sampling_controls_and_probabilities(browser, plain, tmp_path):
    open_with_short_answers(browser, plain)
    browser.click("#open-settings")
    for field, value in (("#top-p", "0.9"), ("#top-k", "20"), ("#seed", "7")):
        browser.type(field, value)
    browser.click("#probabilities")
    body = browser.script("requestFor([{role: 'user', content: 'x'}])[1]")
    assert (body["top_p"], body["top_k"], body["seed"]) == (0.9, 20, 7) and body["top_logprobs"] == 3
    browser.type("#seed", ESCAPE)
    browser.type("#input", "hello" + ENTER)
    browser.until(f"{ANSWERED} == 1")
    titles = browser.script("[...document.querySelectorAll('.token')].map(t => t.title)")
    assert titles and all(title.startswith("probability ") and len(title.split("\n")) == 4 for title in titles)
    shown = browser.script("document.querySelector('.message.assistant .text').textContent")
    assert "bytes:" not in shown and shown.startswith(browser.script("state.messages[1].content[0]"))
    browser.picture(tmp_path / "probabilities.png")
    browser.script("localStorage.clear()")
    assert [line for line in browser.log() if "favicon" not in line] == []


def test_a_message_is_edited_and_what_followed_it_goes(browser, plain):
    open_with_short_answers(browser, plain)
    for text, count in (("first", 1), ("second", 2)):
        browser.type("#input", text + ENTER)
        browser.until(f"{ANSWERED} == {count}")
    browser.click(".message.user .tools button")
    assert browser.script("document.getElementById('input').value") == "first"
    assert browser.script("[state.messages.length, document.querySelectorAll('.message').length]") == [0, 0]
    browser.type("#input", " again" + ENTER)
    browser.until(f"{ANSWERED} == 1")
    assert browser.script("state.messages[0].content") == "first again"


def test_messages_that_do_not_fit_the_context_are_left_out_and_that_is_said(browser, plain):
    open_with_short_answers(browser, plain)
    browser.type("#input", "x" * 400 + ENTER)  # a token each, in a context of 512
    browser.until(f"{ANSWERED} == 1")
    browser.type("#input", "y" * 300 + ENTER)
    browser.until(f"{ANSWERED} == 2")
    said = browser.script("[...document.querySelectorAll('.dropped')].map(p => p.textContent)")
    assert said == ["The oldest 2 messages no longer fit the context and were left out."]


def test_a_model_or_one_of_its_adapters_is_chosen_and_kept(browser, tiny_checkpoint, tmp_path):
    write_adapter(tiny_checkpoint, LoRA(rank=2), tmp_path / "poems")
    process, address, _ = start(tiny_checkpoint, "--port", "0", "--adapter", f"poems={tmp_path / 'poems'}")
    try:
        open_with_short_answers(browser, address)
        assert browser.script("[...document.getElementById('choice').options].map(o => o.text).join()") == (
            "tiny-bytes,poems"
        )
        browser.script(
            "(c => { c.value = 'poems'; c.dispatchEvent(new Event('change')) })(document.getElementById('choice'))"
        )
        assert browser.script("requestFor([{role: 'user', content: 'x'}])[1]")["model"] == "poems"
        browser.type("#input", "hello" + ENTER)
        browser.until(f"{ANSWERED} == 1")
        assert browser.script("document.querySelector('.message.assistant .who').textContent") == "poems"
        browser.do("window/rect", width=500, height=800)
        assert browser.script("document.documentElement.scrollWidth <= innerWidth")
        browser.open(address)
        browser.until("state.model == 'poems' && document.getElementById('choice').value == 'poems'")
        browser.script("localStorage.clear()")
    finally:
        stop(process)


def test_without_adapters_there_is_nothing_to_choose(browser, plain):
    browser.open(plain)
    browser.until("state.model")
    assert browser.script("document.getElementById('choice').hidden")


def test_a_phones_width_shows_everything(browser, plain, tmp_path):
    browser.do("window/rect", width=500, height=800)  # the narrowest that this browser has
    open_with_short_answers(browser, plain)
    assert browser.script("document.documentElement.scrollWidth <= innerWidth")
    browser.click("#open-settings")
    inside = "(r => r.left >= 0 && r.right <= innerWidth)(document.getElementById('settings').getBoundingClientRect())"
    assert browser.script(inside)
    browser.picture(tmp_path / "phone.png")


def test_escape_stops_an_answer(browser, plain):
    browser.open(plain)
    browser.until("state.model")
    # the stream is held open by the page's own reader: the first chunk arrives, the rest takes its time
    browser.script("""(() => { const real = events; events = async function* (body) {
        for await (const event of real(body)) { yield event; await new Promise(r => setTimeout(r, 300)); } }; })()""")
    answers = "[...document.querySelectorAll('.message.assistant')].map(m => m.textContent)"
    for turn in range(1, 5):  # a random model may end its answer by itself
        browser.type("#input", "go on" + ENTER)
        browser.until("state.abort && !document.getElementById('stop').hidden")
        browser.type("#input", ESCAPE)
        browser.until(f"{ANSWERED} == {turn} && !state.abort")
        last = browser.script(answers)[-1]
        if "ended without a word" not in last:
            break
    assert "stopped" in last


def test_errors_are_shown_and_nothing_typed_is_lost(browser, plain):
    browser.open(plain)
    browser.until("state.model")
    browser.type("#input", "x" * 700 + ENTER)
    browser.until("document.getElementById('notice').textContent.includes('context of 512')")
    assert browser.script("document.getElementById('input').value.length") == 700
    assert browser.script("document.querySelectorAll('.message').length") == 0


def test_a_server_with_a_key(browser, locked):
    browser.open(locked)
    browser.until("document.getElementById('notice').textContent.includes('API key')")
    browser.until("!document.getElementById('settings').hidden")
    browser.type("#key", KEY + ENTER)
    browser.until("state.model == 'tiny-bytes' && document.getElementById('notice').hidden")
    browser.type("#key", ESCAPE)
    browser.type("#input", "hi" + ENTER)
    browser.until(f"{ANSWERED} == 1")
