"""Keys, quotas and the audit log: commands for whoever runs the service, on its database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from service.access import LOCAL_TENANT, Scope, check_tenant, new_key
from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, print_json
from service.cli.serve import DatabaseUrl, settings_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.records import KeyRecord
    from service.settings import Settings

keys = typer.Typer(
    no_args_is_help=True, help="Make, list and revoke the keys that requests to the service bring."
)
OfTenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")]


@keys.command()
def create(
    tenant: Annotated[
        str, typer.Option("--tenant", help="Whose models and jobs the key sees.")
    ] = LOCAL_TENANT,
    scope: Annotated[
        Scope,
        typer.Option("--scope", help="read; submit: also send, start, delete; admin: also the audit log."),
    ] = Scope.SUBMIT,
    name: Annotated[str, typer.Option("--name", help="What the key is for, for people.")] = "",
    days: Annotated[int | None, typer.Option("--days", min=1, help="How long it is valid.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the key to this new file instead.")
    ] = None,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Make a key. It is shown this once; the service keeps only its digest."""
    with exits(as_json=as_json):
        from service.db.repositories import keys as rows

        check_tenant(tenant)
        made = new_key()
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        with _writing(data_dir, database_url) as (session, _):
            record = rows.create(
                session,
                tenant=tenant,
                name=name,
                scope=scope,
                prefix=made.prefix,
                digest=made.digest,
                expires_at=expires,
            )
            if output is not None:
                _write_private(output, made.token)
        if as_json:
            print_json(_key_json(record) | ({} if output is not None else {"key": made.token}))
            return
        until = "" if expires is None else f", until {expires:%Y-%m-%d}"
        console().print(f"{record.id}: scope {scope}, tenant {tenant}{until}", markup=False)
        if output is not None:
            console().print(f"wrote {output}", markup=False)
        else:
            console().print(made.token, markup=False, soft_wrap=True)
            console().print("This key is not shown again. From now on every request needs one.", markup=False)


@keys.command("list")
def list_keys(
    tenant: OfTenant = None,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """List keys, without their secrets."""
    with exits(as_json=as_json):
        from service.db.repositories import keys as rows

        with _writing(data_dir, database_url) as (session, _):
            found = [_key_json(record) for record in rows.list_all(session, tenant)]
        _show(
            ("id", "tenant", "scope", "state", "name", "prefix", "created_at", "expires_at"), found, as_json
        )


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its id, or the 12 digits after bitplan_.")],
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Revoke a key; every API process refuses it within 5 seconds."""
    with exits(as_json=as_json):
        from service.db.repositories import keys as rows

        with _writing(data_dir, database_url) as (session, _):
            record = rows.revoke(session, key)
        if record is None:
            raise ValueError(
                f"KEY must be the id of a key. Got {key[:20]!r}. List them with `bitplan keys list`."
            )
        if as_json:
            print_json(_key_json(record))
        else:
            console().print(f"{record.id} is revoked", markup=False)


def quotas(
    tenant: OfTenant = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=0, help="Jobs that wait or run.")] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", help='What it may keep: "100 GiB"; 0: no limit.')
    ] = None,
    running: Annotated[int | None, typer.Option("--running", min=0, help="Jobs that run at once.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Back to the quotas of the settings.")] = False,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Show what tenants may have and do have, or give a tenant quotas of its own; 0 is no limit."""
    with exits(as_json=as_json):
        from search.budget import parse_bytes
        from service.db.repositories import tenants

        given: dict[str, int | None] = {"jobs": jobs, "running": running}
        given["bytes"] = None if size is None else 0 if size.strip() == "0" else parse_bytes(size)
        wanted = {name: value for name, value in given.items() if reset or value is not None}
        if wanted and tenant is None:
            raise ValueError("--tenant must say whose quotas to set. Got none. Add it.")
        with _writing(data_dir, database_url) as (session, settings):
            if wanted and tenant is not None:
                tenants.set_quotas(session, check_tenant(tenant), wanted)
            rows: list[dict[str, Any]] = [
                {"tenant": record.name} | tenants.usage(session, record.name, settings.quotas)
                for record in tenants.list_all(session)
                if tenant in (None, record.name)
            ]
        if not as_json:
            rows = [
                {name: _of(value) if isinstance(value, dict) else value for name, value in row.items()}
                for row in rows
            ]
        _show(("tenant", "jobs", "bytes", "running"), rows, as_json)


def audit(
    tenant: OfTenant = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many of the newest.")] = 50,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Show who wrote what and how it was answered, the newest first."""
    with exits(as_json=as_json):
        from service.db.repositories import audit as rows

        with _writing(data_dir, database_url) as (session, _):
            found = [
                vars(record) | {"created_at": record.created_at.isoformat()}
                for record in rows.newest(session, limit, tenant)
            ]
        _show(
            ("created_at", "tenant", "key_id", "action", "method", "path", "status", "request_id"),
            found,
            as_json,
        )


@contextmanager
def _writing(data_dir: Path | None, database_url: str | None) -> Iterator[tuple[Session, Settings]]:
    """One transaction on the service's database, which is made or migrated first."""
    from service.db.engine import Database
    from service.db.migrate import upgrade

    settings = settings_of(data_dir=data_dir, database_url=database_url)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    database = Database(settings.database_url)
    try:
        with database.write() as session:
            yield session, settings
    finally:
        database.close()


def _write_private(path: Path, token: str) -> None:
    """A new file that only its owner can read. Raises FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token + "\n")


def _key_json(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "scope": record.scope.value,
        "state": record.state(datetime.now(UTC)),
        "name": record.name,
        "prefix": record.prefix,
        "created_at": record.created_at.isoformat(),
        "expires_at": None if record.expires_at is None else record.expires_at.isoformat(),
    }


def _of(quota: dict[str, int | None]) -> str:
    return f"{quota['used']:,}" + (f" of {quota['limit']:,}" if quota["limit"] else "")


def _show(columns: tuple[str, ...], rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if row[column] is None else escape(str(row[column])) for column in columns))
    console().print(table)
