"""The labeling page at ``/`` and the files it is made of, under headers that let nothing but them in.

A page talks to this server only, with a key that the person types in and that is kept in the page's memory. Text from
models enters it as text: the policy below forbids inline code, outside hosts, and every way of turning text into HTML.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from serve.errors import NotFound

router = APIRouter(include_in_schema=False)

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # modules of two versions must not meet in one page
}
"""Sent with every page and every file of one."""

_FOLDER = Path(__file__).with_name("pages")
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PARTS = {path.name: path for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}
"""By name, so that no name in a URL can become a path."""


@router.get("/")
async def labeling_page() -> Response:
    """Where people compare answers."""
    return _answer(_FOLDER / "index.html", "text/html")


@router.get("/pages/{name}")
async def page_part(name: str) -> Response:
    """A style sheet, module or image of a page."""
    if name not in _PARTS:
        raise NotFound("no page has a part of that name")
    return _answer(_PARTS[name], _MEDIA_TYPES[_PARTS[name].suffix])


def _answer(path: Path, media_type: str) -> Response:
    return Response(path.read_bytes(), media_type=media_type, headers=HEADERS)
