"""The web application of ``clip-jax serve``: answers every request with the page, or with a thumbnail of the index.

Every fault of a request is one line on the page with the status that HTTP has for it. Nothing is read from disk by a
name that comes with a request: a thumbnail is asked for by the number of an example that the index holds.
"""

import io
import threading
from collections.abc import Callable, Sequence

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from clip_jax.commands.finder import Finder
from clip_jax.data import images
from clip_jax.data.sources.sample import BadSampleError, Source
from clip_jax.errors import UserError
from clip_jax.evaluation import index
from clip_jax.reports import search as search_page

MAX_CHARACTERS = 1000
"""The longest query; a text tower reads 77 tokens or fewer."""
MAX_UPLOAD = 20 * 2**20
"""Bytes of a request with a picture."""
THUMBNAIL = 320
HEADERS = {
    # The page has no scripts; should a caption smuggle one in, it does not run, and no other site may frame the page.
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def make_app(finder: Finder, source: Source | None, k: int, hosts: Sequence[str]) -> Starlette:
    """``source``: the examples of the index, for thumbnails; None: hits have captions and paths alone.

    ``hosts``: the names under which the page may be asked for, ``*`` for any. Without this check any web page could
    read a page on the loopback address, through a name of its own that resolves to it (DNS rebinding).
    """
    one_at_a_time = threading.Lock()  # a second search would compete for the same devices and memory

    def search(encode: Callable[[], np.ndarray], among: str) -> list[dict]:
        with one_at_a_time:
            return finder.find(encode(), among, k)[0]

    def show(status: int = 200, **parts) -> HTMLResponse:
        found = index.source_indices(finder.folder)
        size = len(found) if found is not None else sum(map(len, _vectors_or_none(finder)))
        if not size and not parts.get("problem"):
            status, parts = (
                503,
                {"problem": f"The index is empty; clip-jax embed --output={finder.folder.name} fills it."},
            )
        text = search_page.page(
            finder.folder.name, size, pictures=source is not None, max_characters=MAX_CHARACTERS, **parts
        )
        return HTMLResponse(text, status, HEADERS)

    def answer(
        encode: Callable[[], np.ndarray], among: str, heading: str, text: str = "", bad: int = 400
    ) -> HTMLResponse:
        """``encode`` makes the query's embedding; ``bad`` is the status if it cannot."""
        if not _vectors_or_none(finder, among):
            what = "" if among == "image" else " of captions"
            line = f"The index is empty{what}; clip-jax embed --output={finder.folder.name} fills it."
            return show(503, text=text, among=among, problem=line)
        try:
            hits = search(encode, among)
        except UserError as error:
            return show(bad, text=text, among=among, problem=str(error))
        return show(text=text, among=among, results=search_page.Results(heading, hits))

    async def home(request: Request) -> Response:
        given = request.query_params
        among = given.get("among", "image")
        if among not in search_page.AMONG:
            raise HTTPException(400, "among: image or text.")
        if "like" in given:
            return await run_in_threadpool(like, given["like"])
        if "q" not in given:
            return await run_in_threadpool(show)
        text = given["q"].strip()
        if len(text) > MAX_CHARACTERS:
            line = f"The query has {len(text):,} characters; at most {MAX_CHARACTERS:,} are searched for."
            raise HTTPException(414, line)
        if not text:
            raise HTTPException(400, "The query is empty: type what the picture shows.")
        return await run_in_threadpool(
            answer, lambda: finder.model.encode_text([text]), among, f"Nearest to “{text}”", text
        )

    def like(text: str) -> Response:
        vector = _vector(finder, _row_of(finder, text))
        return answer(lambda: vector[None].astype(np.float32), "image", f"Similar to number {text}")

    async def upload(request: Request) -> Response:
        # Servers read no more of a body than its announced length: this check bounds it.
        length = request.headers.get("content-length", "")
        if not length.isdigit():
            raise HTTPException(411, "A picture needs an announced length (Content-Length).")
        if int(length) > MAX_UPLOAD:
            raise HTTPException(413, f"The picture is larger than {MAX_UPLOAD // 2**20} MiB.")
        try:
            async with request.form(max_files=1, max_fields=4, max_part_size=4096) as form:
                picture, among = form.get("picture"), str(form.get("among", "image"))
                data = await picture.read() if isinstance(picture, UploadFile) else b""
        except MultiPartException as error:
            raise HTTPException(400, "The form cannot be read; choose one picture.") from error
        if among not in search_page.AMONG:
            raise HTTPException(400, "among: image or text.")
        if not data:
            raise HTTPException(400, "No picture was sent: choose a file first.")
        return await run_in_threadpool(
            answer, lambda: finder.model.encode_image([data]), among, "Nearest to the picture", "", 415
        )

    def thumbnail(request: Request) -> Response:
        number = request.path_params["number"]
        _row_of(finder, number)
        if source is None:
            raise HTTPException(404, "The pictures of this index are not known; start with --data.")
        try:
            picture = images.decode(source[int(number)].image, min_size=THUMBNAIL, exif=True)
        except (BadSampleError, images.BadImageError, OSError, IndexError) as error:
            raise HTTPException(404, f"Picture {number} cannot be read any more.") from error
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        return Response(file.getvalue(), 200, HEADERS | {"cache-control": "private, max-age=600"}, "image/jpeg")

    async def failed(request: Request, error: HTTPException) -> Response:
        problem = error.detail if error.detail[-1:] == "." else f"{error.detail}."
        return await run_in_threadpool(show, error.status_code, problem=problem)

    return Starlette(
        routes=[
            Route("/", home, methods=["GET"]),
            Route("/", upload, methods=["POST"]),
            Route("/thumbnail/{number}", thumbnail, methods=["GET"]),
        ],
        exception_handlers={HTTPException: failed},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
    )


def _vectors_or_none(finder: Finder, among: str = "image") -> list[np.ndarray]:
    try:
        return index.embeddings(finder.folder, among)
    except UserError:
        return []


def _row_of(finder: Finder, text: str) -> int:
    """The row of the example with this number in the source. Raises HTTPException if the index has none."""
    found = index.source_indices(finder.folder)
    rows = np.flatnonzero(found == int(text)) if found is not None and text.isdigit() and len(text) < 16 else []
    if not len(rows):
        raise HTTPException(404, "The index has no picture of this number.")
    return int(rows[0])


def _vector(finder: Finder, row: int) -> np.ndarray:
    """The image embedding of a row, without those of all other rows."""
    for part in finder.vectors("image"):
        if row < len(part):
            return part[row]
        row -= len(part)
    raise IndexError(row)
