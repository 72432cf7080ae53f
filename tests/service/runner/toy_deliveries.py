"""A process for tests that delivers what is due, then leaves. Settings come from the environment."""

from service.db.engine import Database
from service.runner.deliveries import Deliveries
from service.settings import Settings
from service.webhooks.guard import Guard
from service.webhooks.sending import Sender


def main() -> None:
    settings = Settings()
    database = Database(settings.database_url)
    deliveries = Deliveries(database, Sender(Guard.of(settings.webhook_networks)), lease_seconds=0.0)
    while deliveries.deliver_one():
        pass
    database.close()


if __name__ == "__main__":
    main()
