"""The pages /docs and /redoc, which load nothing from other hosts and may run only their own script."""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse

STATIC = "/static-offline-docs"
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def install(app: FastAPI) -> None:
    """Add both pages; fastapi-offline serves what they load."""
    app.add_api_route("/docs", _swagger, include_in_schema=False)
    app.add_api_route("/redoc", _redoc, include_in_schema=False)


def _swagger(request: Request) -> HTMLResponse:
    files = f"{request.scope.get('root_path', '')}{STATIC}"
    return _with_policy(
        get_swagger_ui_html(
            openapi_url=_document(request),
            title="Bitplan",
            oauth2_redirect_url=None,
            swagger_js_url=f"{files}/swagger-ui-bundle.js",
            swagger_css_url=f"{files}/swagger-ui.css",
            swagger_favicon_url=f"{files}/favicon.png",
        )
    )


def _redoc(request: Request) -> HTMLResponse:
    files = f"{request.scope.get('root_path', '')}{STATIC}"
    return _with_policy(
        get_redoc_html(
            openapi_url=_document(request),
            title="Bitplan",
            redoc_js_url=f"{files}/redoc.standalone.js",
            with_google_fonts=False,
            redoc_favicon_url=f"{files}/favicon.png",
        )
    )


def _document(request: Request) -> str:
    return f"{request.scope.get('root_path', '')}/openapi.json"


def _with_policy(page: HTMLResponse) -> HTMLResponse:
    """The page with a policy that names its inline scripts by their digests; it holds nothing of users."""
    scripts = (hashlib.sha256(script).digest() for script in _INLINE_SCRIPT.findall(bytes(page.body)))
    digests = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in scripts)
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' {digests}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; worker-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page
