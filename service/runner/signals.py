"""What stops a handler from outside: exceptions that it must let pass."""

from service.db.repositories.leases import LeaseLost

__all__ = ["Cancelled", "DeadlinePassed", "Interruption", "LeaseLost", "ShuttingDown"]


class Interruption(BaseException):
    """Base of what stops a handler and is no failure. Not an `Exception`: ``except Exception`` lets it
    pass.
    """


class Cancelled(Interruption):
    """Somebody asked for the job to be cancelled: what was measured stays, the job ends cancelled."""


class DeadlinePassed(Interruption):
    """The job's deadline has passed: what was measured stays, the job ends expired."""


class ShuttingDown(Interruption):
    """The runner stops: the job goes back to the queue."""
