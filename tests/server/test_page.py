"""The page, as a person uses it, in a real browser; and its headers without one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gemel.config.server import ServerConfig
from tests.server.browser import Page, browser_page, find_browser
from tests.server.conftest import in_process, listening, until
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio
browser = pytest.mark.browser
IDLE = "!document.querySelector('.writing') && document.querySelectorAll('.assistant').length === {}"
MARKDOWN = """## Heading

A **bold** word, *slanted*, `code`, and [a link](https://example.org/x).

- one
  - inner
- two

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<b>hi</b>")
```
"""
ATTACK = """<script>window.hacked = 1</script><img src="http://evil.example/x" onerror="window.hacked = 1">
[click](javascript:window.hacked=1) [data](data:text/html,<script>window.hacked=1</script>) ![pixel](http://evil.example/pixel.png)
<a href="javascript:window.hacked=1">x</a> `<svg onload=window.hacked=1>` **<iframe src=//evil.example>**

```"><script>window.hacked=1</script>
</code></pre><script>window.hacked = 1</script>
```
| <img src=x onerror=window.hacked=1> | b |
|---|---|
| <style>*{display:none}</style> | [x](vbscript:x) |
"""


async def test_the_policy_is_strict(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        for path in ("/", "/web/app.js", "/web/style.css"):
            headers = (await client.get(path)).headers
            policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["style-src"] == "'self'"
            assert policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'" and policy["base-uri"] == "'none'"
            assert headers["x-content-type-options"] == "nosniff"
        for path in ("/web/../app.py", "/web/%2e%2e/app.py", "/web/", "/web/secret.txt", "/web//etc/passwd"):
            assert (await client.get(path)).status_code == 404


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium found in PATH; on Debian: apt-get install chromium")
    async with browser_page(program) as page:
        yield page
        assert page.problems == []


async def ask(page: Page, text: str) -> None:
    await page.click("#input")
    await page.type(text)
    await page.key("Enter")


@browser
async def test_markdown_streams_into_the_page(page: Page, llm: FakeLLM) -> None:
    llm.reply, llm.delay_s = MARKDOWN, 0.005
    async with listening(llm) as url:
        await page.open(url)
        await ask(page, "Hello")
        await page.until("document.querySelector('.writing .prose h3')")  # formatted while the rest is still to come
        assert llm.running
        await page.until(IDLE.format(1))
        found = await page.js("Object.fromEntries(['h3','strong','em','p code','a','ul ul li','td.right','pre'].map("
                              "s => [s, document.querySelector('.prose ' + s).textContent]))")  # fmt: skip
        assert found == {
            "h3": "Heading", "strong": "bold", "em": "slanted", "p code": "code", "a": "a link", "ul ul li": "inner", "td.right": "2",
            "pre": 'print("<b>hi</b>")',
        }  # fmt: skip
        assert await page.js("document.querySelector('.prose a').rel") == "noopener noreferrer nofollow"
        await page.until("document.querySelector('#live-ttft').textContent.includes('s')")
        assert "tokens" in str(await page.js("document.querySelector('.figures').textContent"))
        await page.command("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        await page.click(".copy")
        await page.until("navigator.clipboard.readText().then(t => t === 'print(\"<b>hi</b>\")')")
        assert all(request.startswith(url + "/") for request in page.requests)


@browser
async def test_stop_continue_regenerate_edit(page: Page, llm: FakeLLM) -> None:
    llm.reply, llm.delay_s = "abcdefghij " * 100, 0.01
    async with listening(llm) as url:
        await page.open(url)
        await ask(page, "First")
        await page.until("(document.querySelector('.prose')?.textContent.length ?? 0) > 20")
        await page.key("Escape")
        await until(lambda: len(llm.aborted) == 1 and not llm.running)
        await page.until(IDLE.format(1))
        partial = str(await page.js("document.querySelector('.prose').textContent"))
        assert "stopped" in str(await page.js("document.querySelector('.figures').textContent"))

        llm.reply, llm.delay_s = "THE END", 0.001
        await page.click("[data-do=continue]")
        await page.until("document.querySelector('.prose').textContent.endsWith('THE END')")
        await page.until(IDLE.format(1))
        text = str(await page.js("document.querySelector('.prose').textContent"))
        assert text.startswith(partial.strip())
        assert llm.tokenizer.decode(llm.seen[-1][0]).rstrip().endswith(partial.strip())

        llm.reply = "Another answer."
        await page.click("[data-do=regenerate]")
        await page.until("document.querySelector('.prose').textContent === 'Another answer.'")
        assert llm.tokenizer.decode(llm.seen[-1][0]).endswith("user: First")

        await ask(page, "Second")
        await page.until(IDLE.format(2))
        await page.js("document.querySelector('.user [data-do=edit]').focus()")
        await page.click(".user [data-do=edit]")
        await page.type(", edited")
        await page.key("Enter")
        await page.until(IDLE.format(1))
        assert await page.js("document.querySelector('.said').textContent") == "First, edited"
        assert llm.tokenizer.decode(llm.seen[-1][0]).endswith("user: First, edited")

        await page.click("#input")
        await page.type("two")
        await page.key("Enter", modifiers=8)
        await page.type("lines")
        assert await page.js("document.querySelector('#input').value") == "two\nlines"


@browser
async def test_conversations_stay(page: Page, llm: FakeLLM) -> None:
    async with listening(llm) as url:
        await page.open(url)
        await ask(page, "Remember me")
        await page.until(IDLE.format(1))
        await page.command("Page.reload")
        await page.until("document.querySelector('.said')?.textContent === 'Remember me'")
        assert await page.js("document.querySelector('.prose').textContent") == llm.reply

        await page.click("#new")
        await page.until("document.querySelector('#empty').checkVisibility()")
        await page.click("#examples button")
        await page.until(IDLE.format(1))
        assert await page.js("document.querySelectorAll('#conversations li').length") == 2

        await page.js("document.querySelector('#conversations [data-do=rename]').focus()")
        await page.click("#conversations [data-do=rename]")
        await page.type("Blue sky")
        await page.key("Enter")
        await page.until("document.querySelector('#title').textContent === 'Blue sky'")
        await page.js("document.querySelector('#conversations [data-do=remove]').focus()")
        await page.click("#conversations [data-do=remove]")
        await page.until("document.querySelectorAll('#conversations li').length === 1")
        await page.click("#toast-action")
        await page.until("document.querySelectorAll('#conversations li').length === 2")
        await page.js("document.querySelector('#conversations li:last-child .name').click()")
        await page.until("document.querySelector('.said').textContent === 'Remember me'")


@browser
async def test_settings_reach_the_engine(page: Page, llm: FakeLLM) -> None:
    async with listening(llm) as url:
        await page.open(url)
        for name, value in {"system": "Be brief.", "temperature": 1.5, "top_k": 40, "seed": 7, "max_tokens": 5, "min_p": 3}.items():
            await page.js(
                f"(() => {{ const f = document.querySelector('#settings').elements.{name}; f.value = {value!r};"
                " f.dispatchEvent(new Event('input', {bubbles: true})); })()"
            )
        await ask(page, "Hi")
        await page.until(IDLE.format(1))
        prompt, params, *_ = llm.seen[0]
        assert llm.tokenizer.decode(prompt) == "system: Be brief.user: Hi"
        assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (1.5, 0.95, 40, 7, 5)
        assert params.min_p == 0 and await page.js("document.querySelector('[name=min_p]').ariaInvalid") == "true"
        assert await page.js("document.querySelector('[data-do=continue]').checkVisibility()")  # it ended at the limit
        assert "limit" in str(await page.js("document.querySelector('.figures').textContent"))


@browser
async def test_errors_are_shown(page: Page, llm: FakeLLM) -> None:
    llm.fail_after = 4
    async with listening(llm) as url:
        await page.open(url)
        await ask(page, "Hi")
        await page.until("document.querySelector('.trouble')?.textContent.includes('failed')")
        assert await page.js("document.querySelector('.prose').textContent") == "Hell"
        llm.fail_after = None
        await page.click("[data-do=regenerate]")
        await page.until(f"document.querySelector('.prose').textContent === '{llm.reply}'")
        assert not await page.js("document.querySelector('.trouble').checkVisibility()")


@browser
async def test_an_answer_cannot_become_code(page: Page, llm: FakeLLM) -> None:
    llm.reply = ATTACK
    async with listening(llm) as url:
        await page.open(url)
        await ask(page, ATTACK.replace("\n", " "))
        await page.until(IDLE.format(1))
        await page.command("Page.reload")  # and not from storage either
        await page.until("document.querySelector('.prose')?.textContent.includes('<script>')")
        assert await page.js("window.hacked === undefined")
        assert await page.js("document.querySelectorAll('#app :is(script, img, iframe, style)').length") == 0
        links = await page.js("[...document.querySelectorAll('#messages a')].map(a => a.href)")
        assert links == ["http://evil.example/x", "http://evil.example/pixel.png"]  # to press, not loaded
        assert all(request.startswith(url + "/") for request in page.requests)
        with pytest.raises(AssertionError, match="Trusted"):
            await page.js("document.body.innerHTML = '<b>x</b>'")
        page.problems = [problem for problem in page.problems if "TrustedHTML" not in problem]


@browser
async def test_dark_and_narrow(page: Page, llm: FakeLLM) -> None:
    llm.reply = MARKDOWN + "\n```\n" + "wide " * 100 + "\n```\n" + "x" * 500 + "\n\n|" + "column|" * 20 + "\n|" + "---|" * 20 + "\n"
    background = "getComputedStyle(document.body).backgroundColor"
    async with listening(llm) as url:
        await page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        await page.open(url)
        dark = await page.js(background)
        await page.click("#theme")
        light = await page.js(background)
        assert light != dark
        await page.command("Page.reload")
        await page.until("document.readyState === 'complete'")
        assert await page.js(background) == light  # the choice beats the system's
        await page.size(390, 844, mobile=True)
        await page.open(url)
        assert await page.js("document.documentElement.scrollWidth") == 390
        await ask(page, "y" * 300)
        await page.until(IDLE.format(1))
        assert await page.js("document.documentElement.scrollWidth") == 390
        assert await page.js("document.querySelector('#scroll').scrollWidth <= 390")
        assert not await page.js("document.querySelector('#new').checkVisibility({visibilityProperty: true})")
        await page.click("#side-open")
        await page.until("document.querySelector('#new').checkVisibility({visibilityProperty: true})")
        await page.key("Escape")
        await page.until("!document.querySelector('#new').checkVisibility({visibilityProperty: true})")


@browser
async def test_everything_has_a_name(page: Page, llm: FakeLLM) -> None:
    async with listening(llm) as url:
        await page.open(url)
        await ask(page, "Hi")
        await page.until(IDLE.format(1))
        tree = (await page.command("Accessibility.getFullAXTree"))["nodes"]
        roles = {"button", "textbox", "slider", "spinbutton", "link", "meter", "article", "log"}
        nameless = [n for n in tree if n.get("role", {}).get("value") in roles and not n["ignored"] and not n.get("name", {}).get("value")]
        assert nameless == []
        for _ in range(3):
            await page.key("Tab")
            assert await page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@browser
async def test_the_key_opens_the_page(page: Page, llm: FakeLLM) -> None:
    async with listening(llm, ServerConfig(api_key="open sesame")) as url:
        await page.open(url)
        for key in ("wrong", "open sesame"):
            await page.until("document.activeElement.name === 'key'")
            await page.type(key)
            await page.key("Enter")
            await page.until("document.querySelector('[role=alert], #examples button')")
        await page.until("document.querySelector('#examples button')")
        await ask(page, "Hi")
        await page.until(f"document.querySelector('.prose')?.textContent === '{llm.reply}'")
        assert not await page.js("document.cookie")
        page.problems = [problem for problem in page.problems if "401" not in problem]  # the two refusals, which Chromium reports
