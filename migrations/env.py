"""Runs migrations inside one write transaction, on a connection that service.db.migrate hands over or on
its own.
"""

from alembic import context
from sqlalchemy import Connection

from service.db.engine import Database
from service.db.tables import Base
from service.settings import Settings


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transaction_per_migration=False,
    )
    context.run_migrations()


def main() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        run(connection)
        return
    database = Database(Settings().database_url)
    with database.write_connection() as own:
        run(own)


main()
