"""The labeling page at ``/``, the operator's at ``/operator``, and the files they are made of, under strict headers.

A page talks to this server only, with a key that the person types in and that is kept in the page's memory. Text from
models enters it as text: the policy below forbids inline code, outside hosts, and every way of turning text into HTML.
"""

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from serve.errors import NotFound

router = APIRouter(include_in_schema=False)

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src {images}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY.format(images="'self'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # modules of two versions must not meet in one page
}
"""Sent with every page and every file of one."""
_PLOT_HEADERS = HEADERS | {"Content-Security-Policy": _POLICY.format(images="'self' blob:")}
"""For a page that fetches images with its key and shows them: an image can do nothing, whatever it holds."""

_FOLDER = Path(__file__).with_name("pages")
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PARTS = {path.name: path for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}
"""By name, so that no name in a URL can become a path."""


@router.get("/")
async def labeling_page() -> Response:
    """Where people compare answers."""
    return _answer(_FOLDER / "index.html", "text/html")


@router.get("/operator")
async def operator_page() -> Response:
    """Where operators watch the release and move it."""
    return _answer(_FOLDER / "operator.html", "text/html", _PLOT_HEADERS)


@router.get("/pages/{name}")
async def page_part(name: str) -> Response:
    """A style sheet, module or image of a page."""
    if name not in _PARTS:
        raise NotFound("no page has a part of that name")
    return _answer(_PARTS[name], _MEDIA_TYPES[_PARTS[name].suffix])


def _answer(path: Path, media_type: str, headers: Mapping[str, str] = HEADERS) -> Response:
    return Response(path.read_bytes(), media_type=media_type, headers=headers)
