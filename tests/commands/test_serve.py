"""``clip-jax serve`` over HTTP: hits, thumbnails of the index alone, and one line on the page for every bad request."""

import html
import http.client
import io
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from clip_jax.commands import main, serve, serve_app
from clip_jax.commands.finder import open_finder
from clip_jax.evaluation import index as indexes
from tests.data.shards import jpeg, sample, write_shard

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


def make_index(folder):
    """A run and an index of eight pictures of which one cannot be decoded, in three shards."""
    shutil.copytree(OLD_RUNS / "vit", folder / "run")
    shutil.copytree(OLD_RUNS / "tokenizer", folder / "run" / "tokenizer")
    samples = [sample(i, caption=f"<b>picture</b> {i}") for i in range(8)]
    samples[3]["jpg"] = jpeg(3)[:150]
    write_shard(folder / "0.tar", samples)
    data = [f"--model={folder / 'run'}", f"--data=tar:{folder / '0.tar'}", f"--output={folder / 'index'}"]
    assert main(["embed", *data, "--shard-size=3"]) == 0
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("a page"))


@pytest.fixture(scope="module")
def client(root):
    source, note = serve.open_pictures(root / "index", None)
    assert note == ""
    app = serve_app.make_app(open_finder(root / "index", None), source, 4, serve.LOOPBACK)
    return TestClient(app, base_url="http://localhost", follow_redirects=False)


def said(response):
    found = re.findall(r'role="alert">([^<]*)<', response.text)
    assert len(found) <= 1 and "\n" not in "".join(found)
    return html.unescape("".join(found))


def numbers(response):
    return [int(n) for n in re.findall(r'src="/thumbnail/(\d+)"', response.text)]


def test_the_first_page_is_a_form_without_scripts_or_links_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and "7 pictures" in page.text and "default-src 'none'" in str(page.headers)
    assert page.text.count("<form") == 2 and not re.search(r"<script|(src|href)=.http|url\(http", page.text)
    assert said(page) == "" and numbers(page) == []


def test_words_find_captions_and_pictures_which_are_escaped(client):
    page = client.get("/", params={"q": "<b>picture</b> 5", "among": "text"})
    # This vocabulary has no digits: all captions are equally near.
    assert page.status_code == 200 and numbers(page) == [0, 1, 2, 4] and page.text.count("<small") == 4
    assert "&lt;b&gt;picture&lt;/b&gt; 2" in page.text and "<b>picture" not in page.text and ">1.000 " in page.text
    assert len(numbers(client.get("/", params={"q": "a red circle"}))) == 4


def test_a_picture_finds_itself_and_a_hit_its_neighbors(client):
    page = client.post("/", files={"picture": ("x.jpg", jpeg(6), "image/jpeg")}, data={"among": "image"})
    assert page.status_code == 200 and numbers(page)[0] == 6
    similar = client.get("/", params={"like": "6"})
    assert numbers(similar) == numbers(page)


def test_thumbnails_are_pictures_of_the_index_and_nothing_else(client, root):
    found = client.get("/thumbnail/6")
    assert found.status_code == 200 and found.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(found.content)).size == (40, 32)
    assert client.get("/thumbnail/3").status_code == 404  # an example of the source that could not be embedded
    for path in ("/thumbnail/8", "/thumbnail/-1", "/thumbnail/x", "/thumbnail/..%2f0.tar", "/../0.tar", "/index.json"):
        answer = client.get(path)
        assert answer.status_code == 404 and said(answer).endswith(".")
    assert client.get("/", params={"like": "3"}).status_code == 404


@pytest.mark.parametrize(
    ("query", "status", "line"),
    [
        ({"q": "  "}, 400, "The query is empty"),
        ({"q": "x" * 1001}, 414, "The query has 1,001 characters; at most 1,000 are searched for."),
        ({"q": "a", "among": "files"}, 400, "among: image or text."),
    ],
)
def test_a_query_that_cannot_be_answered_is_one_line(client, query, status, line):
    page = client.get("/", params=query)
    assert page.status_code == status and said(page).startswith(line) and len(page.text) < 20_000


def test_an_upload_that_cannot_be_answered_is_one_line(client, monkeypatch):
    broken = client.post("/", files={"picture": ("x.jpg", jpeg(1)[:150], "image/jpeg")})
    assert broken.status_code == 415 and "undecodable image" in said(broken)
    empty = client.post("/", files={"picture": ("", b"", "image/jpeg")})
    assert empty.status_code == 400 and said(empty) == "No picture was sent: choose a file first."
    assert client.post("/", data={"picture": "words"}).status_code == 400
    no_length = client.post("/", content=iter([b"abc"]), headers={"content-type": "multipart/form-data; boundary=b"})
    assert no_length.status_code == 411
    monkeypatch.setattr(serve_app, "MAX_UPLOAD", 2**20)
    large = client.post("/", files={"picture": ("x.jpg", bytes(2**20), "image/jpeg")})
    assert large.status_code == 413 and said(large) == "The picture is larger than 1 MiB."
    assert client.put("/").status_code == 405


def test_another_name_for_this_machine_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "127.0.0.1:8000"}).status_code == 200


def test_an_index_without_embeddings_says_how_to_fill_it_and_grows(client, root, tmp_path):
    folder = tmp_path / "growing"
    indexes.prepare(folder, indexes.read_manifest(root / "index"))
    source, _ = serve.open_pictures(folder, None)
    growing = TestClient(serve_app.make_app(open_finder(folder, None), source, 4, ["*"]), base_url="http://localhost")
    for page in (growing.get("/"), growing.get("/", params={"q": "a"})):
        assert page.status_code == 503 and said(page).startswith("The index is empty")
    # A shard is complete with its metadata; what lies there without them is not counted, in whatever order they come.
    for shard in (0, 2):
        for kind in indexes.KINDS.values():
            shutil.copy(root / f"index/{kind}/{kind}_{shard}.npy", folder / kind)
    shutil.copy(root / "index/metadata/metadata_2.parquet", folder / "metadata")
    page = growing.get("/", params={"q": "<b>picture</b> 7", "among": "text"})
    assert page.status_code == 200 and sorted(numbers(page)) == [6, 7]


def test_pictures_of_another_source_are_not_shown(root, tmp_path, capsys):
    write_shard(tmp_path / "0.tar", [sample(i) for i in range(20, 28)])
    command = ["serve", f"--index={root / 'index'}"]
    assert main([*command, "--port=0", f"--data=tar:{tmp_path / '0.tar'}"]) == 2
    assert "not what the index was made from" in capsys.readouterr().err
    assert main(["serve", f"--index={tmp_path / 'none'}"]) == 2
    assert "no such folder" in capsys.readouterr().err
    taken = socket.create_server(("127.0.0.1", 0))
    assert main([*command, f"--port={taken.getsockname()[1]}"]) == 2
    assert "cannot listen there" in capsys.readouterr().err
    taken.close()


def test_the_server_answers_a_megabyte_of_words_with_the_page(root, monkeypatch, capsys):
    import uvicorn

    started, servers, real = threading.Event(), [], uvicorn.Server.startup

    async def startup(self, sockets=None):
        await real(self, sockets)
        servers.append(self)
        started.set()

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    command = ["serve", f"--index={root / 'index'}", "--port=0"]
    thread = threading.Thread(target=main, args=(command,))
    thread.start()
    try:
        assert started.wait(120)
        port = servers[0].servers[0].sockets[0].getsockname()[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/?q=" + "x" * 2**20)
        answer = connection.getresponse()
        assert answer.status == 414 and b"at most 1,000" in answer.read()
        connection.request("GET", "/?q=a+red+circle")
        assert b"/thumbnail/" in connection.getresponse().read()
        connection.close()
    finally:
        if servers:
            servers[0].should_exit = True
        thread.join(60)
    assert not thread.is_alive() and f"http://127.0.0.1:{port}/" in capsys.readouterr().out
