"""Attempts at a real receiver: where they go, what counts, and how long they may take."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpcore2
import pytest

from service.webhooks.guard import Guard
from service.webhooks.sending import Message, Outcome, Sender
from service.webhooks.signing import new_secret, verify
from tests.service.receiver import Receiver, receiving

LOCAL = Guard.of(["127.0.0.0/8"])
SECRET = new_secret()
CONTENT = {"type": "job.succeeded", "data": {"name": "größe"}}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def message(url: str) -> Message:
    return Message("msg_1", url, SECRET, CONTENT)


def test_a_message_arrives_signed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert Sender(LOCAL).send(message(receiver.url)) == Outcome(204)
    (got,) = receiver.received
    assert got.path == "/hooks?team=a"
    assert (got.headers["host"], got.headers["webhook-id"]) == (f"127.0.0.1:{receiver.port}", "msg_1")
    assert got.headers["content-type"] == "application/json"
    assert verify(SECRET, got.headers, got.body) == CONTENT == json.loads(got.body)
    assert SECRET not in repr(got)


@pytest.mark.parametrize("status", [200, 201, 299])
def test_every_2xx_is_delivery(receiver: Receiver, status: int) -> None:
    receiver.statuses = [status]
    assert Sender(LOCAL).send(message(receiver.url)).delivered


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    with receiving() as other:
        receiver.statuses, receiver.headers = [307], {"Location": other.url}
        outcome = Sender(LOCAL).send(message(receiver.url))
        assert outcome == Outcome(307, "HTTP status 307: redirects are not followed")
        assert other.received == []


def test_errors_are_tried_again_and_gone_is_not(receiver: Receiver) -> None:
    receiver.statuses = [500, 404, 410]
    outcomes = [Sender(LOCAL).send(message(receiver.url)) for _ in range(3)]
    assert [(outcome.status, outcome.delivered, outcome.final) for outcome in outcomes] == [
        (500, False, False),
        (404, False, False),
        (410, False, True),
    ]


def test_without_leave_the_receiver_never_hears_of_it(receiver: Receiver) -> None:
    for url in (receiver.url, f"https://localhost:{receiver.port}/", "https://169.254.169.254/"):
        outcome = Sender(Guard()).send(message(url))
        assert outcome.final
        assert str(outcome.error).startswith("blocked: A webhook's host must have public addresses only")
    assert receiver.received == []


def test_a_name_is_resolved_once_and_the_checked_address_is_used(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever answers the name with a public address first and with ours a moment later gets nothing."""
    answers = [["93.184.216.34"], ["127.0.0.1"], ["93.184.216.34", "127.0.0.1"]]
    connected = []

    def connect(self: object, host: str, *rest: object, **options: object) -> Any:
        connected.append(host)
        raise httpcore2.ConnectError("nobody there")

    monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", connect)
    sender = Sender(Guard(resolve=lambda host, port: answers.pop(0)))
    first, second, third = (sender.send(message("https://rebinding.example/")) for _ in range(3))
    assert connected == ["93.184.216.34"]
    assert (first.error, first.final) == ("no connection", False)
    assert second.final
    assert third.final
    assert receiver.received == answers == []


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        outcome = Sender(LOCAL).send(message(f"http://127.0.0.1:{free.getsockname()[1]}/"))
    assert outcome == Outcome(None, "no connection")
    assert Sender(Guard()).send(message("https://nobody.invalid/")).error == "no address for 'nobody.invalid'"


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that lets `answer` speak after it was sent something."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                with suppress(OSError):
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        thread.join(10)
        assert not thread.is_alive()


def test_a_receiver_that_drips_is_cut_off() -> None:
    def drip(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 200 OK\r\n"[:1])
            time.sleep(0.02)

    with answering(drip) as url:
        began = time.monotonic()
        outcome = Sender(LOCAL, timeout_seconds=0.3).send(message(url))
        assert time.monotonic() - began < 10
    assert outcome.error in {"no answer within 0.3 s", "no connection"}


def test_a_receiver_that_says_nothing_is_given_up() -> None:
    def listen(connection: socket.socket) -> None:
        while connection.recv(65536):
            pass

    with answering(listen) as url:
        assert Sender(LOCAL, 0.2).send(message(url)) == Outcome(None, "no answer within 0.2 s")


def test_an_endless_answer_is_not_read() -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")

    with answering(endless) as url:
        assert Sender(LOCAL).send(message(url)) == Outcome(200)


def test_what_is_no_http_is_no_delivery() -> None:
    with answering(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as url:
        assert Sender(LOCAL).send(message(url)) == Outcome(None, "no connection")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_tls_checks_the_name_and_not_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=receiver.example"),
            *("-addext", "subjectAltName=DNS:receiver.example"),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    sender = Sender(Guard(LOCAL.networks, lambda host, port: ["127.0.0.1"]))
    with receiving(tls) as receiver:
        assert sender.send(message(f"https://receiver.example:{receiver.port}/")) == Outcome(204)
        other = sender.send(message(f"https://other.example:{receiver.port}/"))
        assert other == Outcome(None, "the certificate was not accepted")
        assert len(receiver.received) == 1
