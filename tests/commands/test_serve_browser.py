"""The page of ``clip-jax serve`` as a person uses it in Chromium, without scripts; skipped where there is none."""

import shutil
import socket
import threading

import pytest
import uvicorn

from clip_jax.commands import serve, serve_app
from clip_jax.commands.finder import open_finder
from clip_jax.evaluation import index as indexes
from tests.commands.browser import CHROMIUM, Browser
from tests.commands.test_serve import make_index
from tests.data.shards import jpeg

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
HITS = "document.querySelectorAll('.hits img').length"
LOADED = "[...document.querySelectorAll('.hits img')].every(i => i.complete && i.naturalWidth > 0)"
ALERT = "document.querySelector('[role=alert]')?.textContent ?? ''"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("a browser"))


@pytest.fixture
def address():
    """Starts servers of indexes, and ends them."""
    running = []

    def start(folder):
        source, _ = serve.open_pictures(folder, None)
        app = serve_app.make_app(open_finder(folder, None), source, 6, serve.LOOPBACK)
        listening, server = socket.create_server(("127.0.0.1", 0)), uvicorn.Server(serve.settings(app, "127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def test_a_person_searches_by_words_and_by_a_picture_and_follows_a_hit(root, address, browser, tmp_path):
    browser.without_scripts()
    browser.open(address(root / "index"))
    browser.type("#q", "a red circle")
    browser.wait(f"{HITS} == 6 && {LOADED}")
    assert browser.evaluate("document.querySelector('#q').value") == "a red circle"
    browser.click(".hits a")
    browser.wait("location.search.startsWith('?like=')")
    browser.wait(f"{HITS} == 6 && {LOADED}")
    (tmp_path / "6.jpg").write_bytes(jpeg(6))
    browser.choose_file("#picture", tmp_path / "6.jpg")
    browser.click("form[method=post] button")
    browser.wait("document.querySelector('h2')?.textContent == 'Nearest to the picture'")
    browser.wait(LOADED)
    assert browser.evaluate("document.querySelector('.hits img').getAttribute('src')") == "/thumbnail/6"
    (tmp_path / "broken.jpg").write_bytes(jpeg(6)[:150])
    browser.choose_file("#picture", tmp_path / "broken.jpg")
    browser.click("form[method=post] button")
    browser.wait(f"{ALERT}.includes('undecodable image')")
    assert browser.status == 415
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_megabyte_of_words_and_an_empty_index_are_a_line(root, address, browser, tmp_path):
    at = address(root / "index")
    browser.open(at)
    # The field takes no more than a query may have; a link may hold anything.
    browser.evaluate("document.querySelector('#q').removeAttribute('maxlength')")
    browser.evaluate("document.querySelector('#q').value = 'x'.repeat(2**20)")
    browser.click("form[role=search] button")
    browser.wait(f"{ALERT}.includes('at most 1,000')")
    assert browser.status == 414
    indexes.prepare(tmp_path / "empty", indexes.read_manifest(root / "index"))
    browser.open(address(tmp_path / "empty"))
    browser.wait(f"{ALERT}.startsWith('The index is empty')")
    assert browser.status == 503
    shutil.copytree(root / "index", tmp_path / "empty", dirs_exist_ok=True)
    browser.type("#q", "a")
    browser.wait(f"{HITS} == 6")
