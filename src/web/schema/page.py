"""GET /schema: the API's description as Swagger UI; GET /schema/openapi.json for programs.

A browser that opens the service's address is redirected here. The page loads nothing from other
hosts: the files of Swagger UI come from an installed package.
"""

import base64
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from litestar import Response, Router, get
from litestar.enums import MediaType
from litestar.response import Redirect

from web.requests import AnyRequest

ASSET_MAX_AGE_S = 3600  # how long browsers may keep the files after an update of the package

_START = (
    'SwaggerUIBundle({url: "/schema/openapi.json", dom_id: "#ui", deepLinking: true, '
    "validatorUrl: null})"  # the validator is a service on the internet
)
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect y='3' width='16' height='10' rx='2' fill='%23256'/%3E"
    "%3Crect y='5' width='16' height='2' fill='%23fff'/%3E%3C/svg%3E"
)
_PAGE = f"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Payment Service</title>
<link rel="icon" href="{_ICON}">
<link rel="stylesheet" href="/schema/swagger-ui.css">
<body>
<div id="ui"><a href="/schema/openapi.json">openapi.json</a></div>
<script src="/schema/swagger-ui-bundle.js"></script>
<script>{_START}</script>
</html>
"""


def _policy() -> str:
    """Content security policy: the page's own two files, and the one line that starts them."""
    start = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'self' 'sha256-{start}'; "
        "style-src 'self'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_PAGE_HEADERS = {
    "Content-Security-Policy": _policy(),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ASSET_HEADERS = {
    "Cache-Control": f"public, max-age={ASSET_MAX_AGE_S}",
    "X-Content-Type-Options": "nosniff",
}


@get("/", status_code=302, sync_to_thread=False)
def root() -> Redirect:
    return Redirect("/schema")


@get("/", media_type=MediaType.HTML, sync_to_thread=False)
def page() -> Response[str]:
    return Response(_PAGE, headers=_PAGE_HEADERS, media_type=MediaType.HTML)


@get("/openapi.json", media_type=MediaType.JSON)
async def document(request: AnyRequest) -> Response[bytes]:
    return Response(request.app.state.openapi, media_type=MediaType.JSON)


# In a thread: the first request reads from disk, which must not block the event loop.
@get("/swagger-ui-bundle.js", sync_to_thread=True)
def script() -> Response[bytes]:
    return _asset("swagger-ui-bundle.js", "text/javascript; charset=utf-8")


@get("/swagger-ui.css", sync_to_thread=True)
def style() -> Response[bytes]:
    return _asset("swagger-ui.css", "text/css; charset=utf-8")


docs = Router("/schema", route_handlers=[page, document, script, style])


def _asset(name: str, media_type: str) -> Response[bytes]:
    # As a header: the framework would add a second charset to a text media type.
    headers = _ASSET_HEADERS | {"Content-Type": media_type}
    return Response(_read(name), headers=headers)


@cache
def _read(name: str) -> bytes:
    spec = find_spec("litestar_offline_docs")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "static" / name).read_bytes()
