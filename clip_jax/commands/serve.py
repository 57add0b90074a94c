"""``clip-jax serve --index=DIR``: a page on which a person searches pictures by words or by a picture."""

import argparse
import socket
from pathlib import Path

from clip_jax.commands import search
from clip_jax.errors import UserError

HELP = "Serve a page that searches an index by words or by a picture; on this machine only, unless --host is given."
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_REQUEST_LINE = 4 * 2**20
"""Bytes up to which a request line is read, so that a megabyte of words is answered with a page."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, help="a folder that clip-jax embed wrote")
    parser.add_argument("--model", help="default: the one that the index was made with")
    parser.add_argument("--data", help="the source of the pictures; default: the one that the index was made from")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: on all, for anybody")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("-k", type=int, default=24, help="hits on a page")
    search.add_approximate(parser)


def run(arguments: argparse.Namespace) -> None:
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("needs the extra packages: pip install 'clip-jax-tpu[serve]'") from error

    from clip_jax.commands.finder import open_finder  # after parsing: JAX takes a second to import
    from clip_jax.commands.serve_app import make_app

    if arguments.k < 1 or not 0 <= arguments.port < 65536:
        raise UserError("-k: at least 1; --port: 0 to 65535")
    search.check_recall(arguments)
    folder = Path(arguments.index).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; write an index with clip-jax embed --output={folder}")
    source, note = open_pictures(folder, arguments.data)
    finder = search.approximately(open_finder(folder, arguments.model), arguments, filled(folder))
    hosts = (*LOOPBACK, arguments.host) if arguments.host in LOOPBACK else ("*",)
    app = make_app(finder, source, arguments.k, hosts)
    configured = settings(app, arguments.host, arguments.port)
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    try:
        listening = socket.create_server((arguments.host, arguments.port), family=family)
    except OSError as error:
        where = f"--host={arguments.host} --port={arguments.port}"
        raise UserError(f"{where}: cannot listen there ({error.strerror})") from error
    if note:
        print(note)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"http://{host}:{listening.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(configured).run(sockets=[listening])


def filled(folder: Path) -> list[str]:
    """What of an index can be searched: ``image``, ``text``."""
    from clip_jax.evaluation import index

    def has(among: str) -> bool:
        try:
            return bool(index.embeddings(folder, among))
        except UserError:
            return False

    return [among for among in ("image", "text") if has(among)]


def settings(app, host: str, port: int):
    """uvicorn's settings, with bounds on everything that a request can make grow."""
    import uvicorn

    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",  # the implementation whose bound on a request line can be set
        ws="none",
        h11_max_incomplete_event_size=MAX_REQUEST_LINE,
        limit_concurrency=64,
        timeout_keep_alive=5,
        log_config=None,  # uvicorn's own would close all handlers that other libraries have set up
        access_log=False,
        server_header=False,
    )


def open_pictures(folder: Path, data: str | None):
    """(the source of an index's pictures or None, a note on why there is none).

    Raises UserError for a source whose examples are not those that were embedded: it would show other pictures.
    """
    from clip_jax.data.sources import open_source
    from clip_jax.evaluation import index

    manifest = index.read_manifest(folder)
    where = data or manifest.get("data")
    if where is None:
        return None, "The index does not name its pictures: hits are shown without them; --data names a source."
    columns = {name: manifest[name] for name in ("caption", "image") if name in manifest}
    try:
        source = open_source(where, **columns)
    except UserError as error:
        raise UserError(f"the pictures of the index: {error}; --data names another folder") from error
    if source.fingerprint != manifest.get("source", source.fingerprint):
        raise UserError(f"{where}: not what the index was made from; embed it again, or name its copy with --data")
    return source, ""
