"""Write the OpenAPI document that the repository keeps: `python -m service.api.openapi`."""

from __future__ import annotations

import json
from pathlib import Path

from service.app import create_app

PATH = Path("docs/openapi.json")


def openapi_text() -> str:
    """The document of the application, indented, so that a change can be read."""
    return json.dumps(create_app().openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(openapi_text(), encoding="utf-8")
