"""A driver without Ray: its "cluster" is a session in this very process. Units named die:CODE end it,
those named away:SECONDS take so long while another slot says that it has no node.
"""

import os
import sys
import time
from multiprocessing.connection import Connection

from sensitivity.spec import SessionSpec
from service.executors import sessions
from service.executors.messages import pack, pack_result, unpack, unpack_unit


def main(descriptor: int) -> None:
    connection: Connection = Connection(descriptor)

    def say(*parts: bytes, **facts: object) -> None:
        for part in (pack(facts), *parts):
            connection.send_bytes(part)

    hello = unpack(connection.recv_bytes())
    if hello["ray"]["address"] == "nowhere:1":
        say(said="away", why="Ray must answer at nowhere:1.")
        return
    say(said="connected")
    session = sessions.build(hello["factory"], SessionSpec.from_json(hello["spec"]))
    say(said="gaps", gaps=["network not isolated"])
    while "close" not in (message := unpack(connection.recv_bytes())):
        unit = unpack_unit(connection.recv_bytes(), connection.recv_bytes())
        say(said="began", key=message["key"])
        verb, _, rest = unit.layer.partition(":")
        if verb == "die":
            print("the cluster fell over", flush=True)
            os._exit(int(rest))
        if verb == "away":
            say(said="away", why="Nodes must have the runner's versions.")
            time.sleep(float(rest))
        say(*pack_result(session.run(unit)), said="result", key=message["key"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
