"""Commands that start processes: the whole service, a runner alone, and the migration they need."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli import options
from service.cli.exits import exits
from service.cli.output import console
from service.settings import Settings

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database-url", help="sqlite:///... or postgresql://... (BITPLAN_DATABASE_URL)."),
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes of the runner.")]


def serve(
    host: Annotated[
        str, typer.Option("--host", help="A loopback address: there is no access control yet.")
    ] = "",
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="TCP port (default 8000).")
    ] = None,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    workers: Workers = None,
) -> None:
    """Start the API and a runner; Ctrl-C stops both."""
    from service.serve import serve as run

    with exits():
        settings = settings_of(
            data_dir=data_dir, database_url=database_url, workers=workers, host=host or None, port=port
        )
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        console().print(f"http://{shown}:{settings.port}  (docs at /docs)  data in {settings.data_dir}")
        code = run(settings)
    raise typer.Exit(code)


def runner(
    data_dir: options.DataDir = None, database_url: DatabaseUrl = None, workers: Workers = None
) -> None:
    """Start a runner alone: it claims jobs from the database and measures them."""
    from service.runner import process

    with exits():
        process.run(settings_of(data_dir=data_dir, database_url=database_url, workers=workers))


def migrate(data_dir: options.DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Bring the database to the schema of this version."""
    from service.db.migrate import upgrade

    with exits():
        settings = settings_of(data_dir=data_dir, database_url=database_url)
        upgrade(settings.database_url)
        console().print("the database is at the schema of this version")


def settings_of(**given: object) -> Settings:
    """Settings of the environment with what the command line says on top. Raises ValueError."""
    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
