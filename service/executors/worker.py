"""What a worker process does, once it is confined (service/executors/confine.py).

It reads a session's spec and then units from one socket, and answers each. It has no database and no keys,
and leaves when its socket closes, even in the middle of a unit.
"""

import os
import select
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from sensitivity.spec import SessionSpec
from service.executors import sessions
from service.executors.confine import Isolation, limit_cpu
from service.executors.messages import failure_of, pack, pack_result, unpack, unpack_unit
from service.executors.protocol import Session
from service.failpoints import failpoint


def serve(descriptor: int, isolation: Isolation, gaps: Sequence[str]) -> None:
    """Serve the socket until the other end closes it; `gaps` is what this process is not kept from."""
    connection: Connection = Connection(descriptor)
    threading.Thread(target=_leave_with, args=(connection.fileno(),), daemon=True).start()
    try:
        hello = unpack(connection.recv_bytes())
        connection.send_bytes(pack({"gaps": list(gaps)}))
        if gaps and isolation.mode == "require":
            return
        limit_cpu(isolation.cpu_seconds)
        session = _build(connection, hello["factory"], SessionSpec.from_json(hello["spec"]))
        while session is not None:
            message = connection.recv_bytes(), connection.recv_bytes()
            limit_cpu(isolation.cpu_seconds)
            _answer(connection, session, message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _leave_with(descriptor: int) -> None:
    """End the process when the runner's end of the socket is gone."""
    poller = select.poll()
    poller.register(descriptor, select.POLLHUP | select.POLLERR)
    poller.poll()
    os._exit(0)


def _build(connection: Connection, factory: str, spec: SessionSpec) -> Session | None:
    try:
        session = sessions.build(factory, spec)
    except Exception as error:
        traceback.print_exc()
        connection.send_bytes(pack({"failure": failure_of(error, "bad_input").as_json()}))
        return None
    connection.send_bytes(pack({"ready": True}))
    return session


def _answer(connection: Connection, session: Session, message: tuple[bytes, bytes]) -> None:
    """Run one unit; what it prints, and the trace of what it raises, goes to the log."""
    failpoint("worker.before_unit")
    try:
        head, arrays = pack_result(session.run(unpack_unit(*message)))
    except Exception as error:
        traceback.print_exc()
        connection.send_bytes(pack({"failure": failure_of(error, "unit_error").as_json()}))
        return
    failpoint("worker.after_unit")
    connection.send_bytes(pack({"ready": True}))
    connection.send_bytes(head)
    connection.send_bytes(arrays)
