"""The process between a runner and a Ray cluster.

``python -m service.executors.ray_driver FD`` takes units from the runner's socket, has the cluster's workers
run them, and answers. Ray ends the process that uses it when the cluster is away for long, and unpickles what
nodes send: neither may happen to the process that holds the database. When the runner's end of the socket
closes, this process ends, and with it every actor, because none is detached.

``python -m service.executors.ray_driver`` reads `RaySettings` (JSON) from standard input and prints what the
nodes of that cluster are.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from sensitivity.spec import SessionSpec
from service.executors.confine import Isolation
from service.executors.messages import pack, pack_result, unpack, unpack_unit
from service.executors.pool import Pool
from service.executors.protocol import Outcome
from service.executors.ray_settings import RaySettings

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 60.0
WAIT_SECONDS = 0.5


class Away(Exception):  # noqa: N818 - says what happened
    """The cluster cannot be used; says what to do."""


class Teller:
    """Writes messages to the runner from any thread."""

    def __init__(self, connection: Connection):
        self._connection, self._lock = connection, threading.Lock()

    def say(self, said: str, *attached: bytes, **facts: Any) -> None:
        """One message and what belongs to it."""
        with self._lock:
            for part in (pack({"said": said, **facts}), *attached):
                self._connection.send_bytes(part)

    def outcome(self, outcome: Outcome) -> None:
        """What became of a unit."""
        if outcome.result is not None:
            self.say("result", *pack_result(outcome.result), key=outcome.key)
        elif outcome.failure is not None:
            self.say("failure", key=outcome.key, failure=outcome.failure.as_json())


def connect(settings: RaySettings) -> None:
    """Join the cluster as its driver. Raises `Away`."""
    _require_answer(settings.address)
    import ray

    try:
        ray.init(address=settings.address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise Away(advice(settings, error)) from error


def serve(descriptor: int) -> None:
    """Serve the socket until the runner says close, or closes it."""
    connection: Connection = Connection(descriptor)
    teller = Teller(connection)
    threading.Thread(target=_leave_with, args=(connection.fileno(),), daemon=True).start()
    hello = unpack(connection.recv_bytes())
    settings = RaySettings.from_json(hello["ray"])
    try:
        connect(settings)
    except Away as away:
        teller.say("away", why=str(away))
        return
    teller.say("connected")
    pool = _pool(hello, settings, teller)
    stop = threading.Event()
    telling = threading.Thread(target=_tell_outcomes, args=(pool, teller, stop), daemon=True)
    telling.start()
    grace = _take_units(connection, pool)
    pool.close(grace)
    stop.set()
    telling.join()


def _pool(hello: dict[str, Any], settings: RaySettings, teller: Teller) -> Pool:
    from service.executors.ray_keeper import RayKeeper, Telling, Wanted

    told: set[tuple[str, ...]] = {()}

    def tell_gaps(gaps: tuple[str, ...]) -> None:
        if gaps not in told:
            told.add(gaps)
            teller.say("gaps", gaps=list(gaps))

    telling = Telling(
        gaps=tell_gaps,
        log=lambda event, facts: teller.say("log", event=event, facts=facts),
        unusable=lambda why: teller.say("away", why=why),
    )
    spec, isolation = SessionSpec.from_json(hello["spec"]), Isolation.from_json(hello["isolation"])
    wanted = Wanted(spec, hello["factory"], isolation, settings, telling)
    return Pool(
        hello["workers"],
        lambda slot: RayKeeper(wanted, slot),
        lambda key: teller.say("began", key=key),
    )


def _take_units(connection: Connection, pool: Pool) -> float:
    """Queue what comes; the grace, once the runner closes."""
    while True:
        message = unpack(connection.recv_bytes())
        if "close" in message:
            return float(message["close"])
        unit = unpack_unit(connection.recv_bytes(), connection.recv_bytes())
        pool.submit(message["key"], unit)


def _tell_outcomes(pool: Pool, teller: Teller, stop: threading.Event) -> None:
    """Pass outcomes on; after `stop` what is left of them."""
    try:
        while True:
            last = stop.is_set()
            for outcome in pool.wait(0 if last else WAIT_SECONDS):
                teller.outcome(outcome)
            if last:
                return
    except OSError:  # the runner is gone
        return
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _leave_with(descriptor: int) -> None:
    """End the process when the runner's end of the socket is gone: Ray then ends the actors."""
    poller = select.poll()
    poller.register(descriptor, select.POLLHUP | select.POLLERR)
    poller.poll()
    os._exit(0)


def _require_answer(address: str) -> None:
    """Ray itself would wait for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise Away(
            f"Ray must answer at {address} (BITPLAN_RAY_ADDRESS). Got: {error}. Start it there with `ray"
            " start --head --port=6379`, or correct the address."
        ) from error


def advice(settings: RaySettings, error: BaseException) -> str:
    """What a person can do about a cluster that answers and does not let us in."""
    cause = error.__cause__ or error
    found = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
    if "node info" in str(cause) or "node ids" in str(cause):
        return (
            f"A node of the Ray cluster at {settings.address} must run on the runner's machine. Got {found}"
            f" Start one there that takes no work: `ray start --address={settings.address} --num-cpus=0`."
        )
    return (
        f"The Ray cluster at {settings.address} must let this runner in. Got {found}. Its token must be that"
        " of the cluster (BITPLAN_RAY_TOKEN_FILE, or RAY_AUTH_TOKEN), and Python and Ray of the same version."
    )


def probe(settings: RaySettings) -> dict[str, Any]:
    """The nodes of the cluster, and what a worker on each would not be kept from. Raises `Away`."""
    connect(settings)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from service.executors.ray_scorer import examine

    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = {
        node["NodeID"]: ray.remote(examine)
        .options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote()
        for node in alive
        if node["Resources"].get("CPU")
    }
    nodes = []
    for node in alive:
        said: dict[str, Any] = {}
        if node["NodeID"] in asked:
            try:
                said = ray.get(asked[node["NodeID"]], timeout=PROBE_SECONDS)
            except Exception as error:  # one node's trouble is told as that node's
                said = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        counts = {name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")}
        nodes.append({"host": node["NodeManagerHostname"], **counts, **said})
    return {"nodes": nodes}


def main(arguments: list[str]) -> None:
    """See the module."""
    if arguments:
        serve(int(arguments[0]))
        return
    try:
        print(json.dumps(probe(RaySettings.from_json(json.load(sys.stdin)))))
    except Away as away:
        print(json.dumps({"away": str(away)}))


if __name__ == "__main__":
    main(sys.argv[1:])
