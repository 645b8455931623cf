"""The live page, in a real headless browser (Debian's or Chrome's own), driven through playwright."""

import re
import shutil
import threading
import time
import urllib.parse

import httpx
import pytest

from jaxstack.engine import SamplingParams
from tests.serving.stopping import stopping

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

# No sandbox: tests may run as root. The rest keeps the browser from calling its maker.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium on this machine; `make test` installs it where it may (apt-get, as root)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, open; it must not have complained, nor asked anybody else for anything."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    complaints, strangers = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    # A refused request stands in the console as well; that is no complaint of the page.
    page.on(
        "console",
        lambda m: complaints.append(m.text) if m.type == "error" and "status of 400" not in m.text else None,
    )
    ours = urllib.parse.urlsplit(server.url).netloc
    page.on(
        "request", lambda r: strangers.append(r.url) if urllib.parse.urlsplit(r.url).netloc not in (ours, "") else None
    )
    page.goto(server.url)
    eventually(page, "document.getElementById('state').textContent === 'ready'")
    yield page
    page.close()
    assert not complaints
    assert not strangers


def eventually(page, condition: str) -> None:
    """Waits until the JavaScript expression holds. (playwright's own waiting needs `eval`, which the page forbids.)"""
    deadline = time.monotonic() + 300
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"never: {condition}"
        page.wait_for_timeout(20)


def test_it_shows_the_model_and_counts_its_pages(page, engine, server):
    assert page.title() == f"{server.config.model_name} · jaxstack"
    assert page.inner_text("#model") == server.config.model_name
    total = engine.scheduler.pool.size
    shown = [int(page.inner_text(f"#{name}").replace(",", "")) for name in ("free", "held", "shared")]
    assert sum(shown) == total
    assert f"{total:,} pages" in page.inner_text("#scale")


def test_it_follows_a_request_that_is_running(page, engine):
    """Running requests, their pages in the picture, and tokens per second, while and after some are answered."""
    answers, seen = [], threading.Event()
    sampling = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)

    def ask():  # one after the other, for as long as it takes the page to look
        while not seen.is_set():
            answers.extend(engine.generate([[5, 6, 7]], sampling))

    worker = threading.Thread(target=ask)
    worker.start()
    eventually(page, "Number(document.getElementById('running').textContent) >= 1")
    eventually(page, "Number(document.getElementById('held').textContent.replace(',', '')) >= 1")
    eventually(page, "Number(document.getElementById('rate').textContent.replace(',', '')) > 0")
    seen.set()
    worker.join()
    eventually(page, "document.getElementById('running').textContent === '0'")
    eventually(page, "Number(document.getElementById('shared').textContent.replace(',', '')) > 0")
    assert {len(answer.completions[0].token_ids) for answer in answers} == {1500}


def test_the_picture_has_a_square_of_the_right_color_for_each_owner(page):
    painted = page.evaluate(
        """() => {
            const element = document.getElementById("pages"), seen = new Set();
            const dots = element.getContext("2d").getImageData(0, 0, element.width, element.height).data;
            for (let i = 0; i < dots.length; i += 4)
                if (dots[i + 3] === 255) seen.add([dots[i], dots[i + 1], dots[i + 2]].join());
            return [...seen];
        }"""
    )
    wanted = {
        ",".join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))
        for color in (page.evaluate(f"color('--{name}')") for name in ("free", "shared"))
    }
    assert wanted <= set(painted)


def test_a_prompt_is_answered_in_pieces(page, client):
    page.fill("#prompt", "hello")
    page.fill("#tokens", "40")
    page.click("#send")
    eventually(page, "document.getElementById('usage').textContent.includes('tokens/s')")
    wanted = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=40, temperature=0
    )
    assert page.evaluate("document.getElementById('answer').textContent") == wanted.choices[0].message.content
    assert page.inner_text("#usage").startswith(f"{wanted.usage.completion_tokens} tokens, first after ")
    assert page.is_enabled("#send") and page.is_disabled("#stop")


def test_stop_ends_the_answer_and_frees_its_pages(page, engine):
    page.fill("#prompt", "and on and on")
    page.fill("#tokens", "1900")
    with stopping(engine, after=40):
        page.press("#prompt", "Control+Enter")
        eventually(
            page,
            "document.getElementById('answer').textContent.length > 0 || !document.getElementById('stop').disabled",
        )
        page.click("#stop")
    eventually(page, "document.getElementById('usage').textContent === 'stopped'")
    eventually(page, "document.getElementById('held').textContent === '0'")


def test_a_refusal_is_shown_as_the_server_words_it(page):
    page.fill("#prompt", "hello")
    page.fill("#tokens", "100000")
    with page.expect_response(re.compile("/v1/")) as reply:
        page.click("#send")
    message = reply.value.json()["error"]["message"]
    eventually(page, "document.querySelector('#answer .error') !== null")
    assert page.inner_text("#answer .error") == message


def test_what_a_model_writes_cannot_become_markup(page):
    page.evaluate("put('<img src=x onerror=alert(1)>', 'said')")
    assert page.evaluate("document.querySelectorAll('#answer img').length") == 0
    assert page.evaluate("document.getElementById('answer').textContent") == "<img src=x onerror=alert(1)>"


def test_it_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_pages_headers_allow_nothing_from_elsewhere(server, http: httpx.Client):
    reply = http.get(server.url)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"https?:", reply.text)


def test_the_snapshot_adds_up(server, http: httpx.Client, engine):
    found = http.get(f"{server.url}/page/snapshot").json()
    pages = found["pages"]
    assert pages["free"] + pages["held"] + pages["shared"] == pages["total"] == engine.scheduler.pool.size
    assert len(found["cells"]) == -(-pages["total"] // pages["per_cell"])
    assert found["cells"].count("f") == pages["free"]


def test_it_shows_clients_and_how_even_their_service_is(page, engine, client):
    for _ in range(2):
        client.completions.create(model="tiny", prompt="hello", max_tokens=3, user="me & <b>you</b>")
    eventually(page, "!document.getElementById('fairness').hidden")
    eventually(page, "document.getElementById('clients').textContent.includes('me & <b>you</b>')")
    reading = engine.fairness()
    assert f"policy {reading.policy}" in page.inner_text("#certificate")
    service = f"{reading.clients['me & <b>you</b>'].service:,}"
    eventually(page, f"document.getElementById('clients').textContent.includes('{service}')")
