"""Commands that start processes: the whole service, a runner alone, and the migration they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import options
from service.cli.exits import CommandError, exits
from service.cli.output import console, print_json

if TYPE_CHECKING:
    from service.settings import Settings

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database-url", help="sqlite:///... or postgresql://... (BITPLAN_DATABASE_URL)."),
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes of the runner.")]


def serve(
    host: Annotated[
        str, typer.Option("--host", help="A loopback address, or another once there are keys.")
    ] = "",
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="TCP port (default 8000).")
    ] = None,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    workers: Workers = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Ask for no keys: whoever can connect may do everything.")
    ] = False,
) -> None:
    """Start the API and a runner; Ctrl-C stops both."""
    with exits():
        from service.serve import require_safe_bind
        from service.serve import serve as run

        settings = settings_of(
            data_dir=data_dir,
            database_url=database_url,
            workers=workers,
            host=host or None,
            port=port,
            access="open" if insecure else None,
        )
        require_safe_bind(settings)
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        console().print(f"http://{shown}:{settings.port}  (docs at /docs)  data in {settings.data_dir}")
        code = run(settings)
    raise typer.Exit(code)


def runner(
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    workers: Workers = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Start none; exit with 1 unless one of this host says that it lives."),
    ] = False,
) -> None:
    """Start a runner alone: it claims jobs from the database and measures them."""
    with exits(interrupted="the runner gave its job back"):
        settings = settings_of(data_dir=data_dir, database_url=database_url, workers=workers)
        if check:
            _check_runner(settings)
            return
        from service.runner import process

        process.run(settings)


def _check_runner(settings: Settings) -> None:
    from service.checks import runner_here

    found = runner_here(settings)
    if found.state != "ok":
        raise CommandError(found.detail)
    console().print(found.detail)


def migrate(
    data_dir: options.DataDir = None, database_url: DatabaseUrl = None, as_json: options.Json = False
) -> None:
    """Bring the database to the schema of this version."""
    with exits(as_json=as_json):
        from service.db.migrate import upgrade

        settings = settings_of(data_dir=data_dir, database_url=database_url)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        version = upgrade(settings.database_url)
        if as_json:
            print_json({"schema_version": version})
        else:
            console().print(f"the database is at schema version {version}, that of this Bitplan")


def settings_of(**given: object) -> Settings:
    """Settings of the environment with what the command line says on top. Raises ValueError."""
    from service.settings import Settings

    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
