from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import json
import tracemalloc

import pytest

from service.api import blob_stream
from service.store.partials import PartialWriter


async def stalled(app, path, data):
    """What answers a body of which only `data` ever comes."""
    incoming = [{"type": "http.request", "body": data, "more_body": True}]

    async def receive():
        return incoming.pop() if incoming else await asyncio.Event().wait()

    return await patched(app, path, receive)


async def streamed(app, path, chunk, count):
    """What answers a body of `count` times `chunk`."""
    left = count

    async def receive():
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": chunk, "more_body": left > 0}

    return await patched(app, path, receive)


async def patched(app, path, receive):
    """Status, headers and body that answer a PATCH whose body `receive` brings."""
    answer = []

    async def send(message):
        answer.append(message)

    scope = {
        "type": "http",
        "method": "PATCH",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"upload-offset", b"0"), (b"host", b"testserver")],
        "client": ("testclient", 50000),
        "server": ("testserver", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    start, *bodies = answer
    return start["status"], dict(start["headers"]), b"".join(part.get("body", b"") for part in bodies)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def blob(api):
    """The path of one missing blob of an open calibration upload, and its content."""
    data = bytes(range(256)) * 40
    upload = api.http.post("/v1/uploads", json=api.manifest({"c.txt": data}, "calibration")).json()
    return f"/v1/uploads/{upload['id']}/blobs/{digest(data)}", data


def test_a_manifest_is_answered_with_the_missing_blobs(api, model_files):
    response = api.http.post("/v1/uploads", json=api.manifest(model_files))
    body = response.json()
    assert response.status_code == 201
    assert response.headers["Location"] == f"/v1/uploads/{body['id']}"
    assert {item["sha256"] for item in body["missing"]} == {digest(data) for data in model_files.values()}
    assert api.http.get(response.headers["Location"]).json()["missing"] == body["missing"]


def test_a_model_goes_in_and_waits_for_verification(api, model_files):
    response = api.complete(model_files)
    model = response.json()
    assert response.status_code == 201
    assert model["id"].startswith("model_")
    assert model["state"] == "verifying"
    assert model["summary"]["model_type"] == "llama"
    (job,) = api.http.get("/v1/jobs", params={"kind": "verify_model"}).json()["items"]
    assert job["request"] == {"model": model["id"]}


def test_the_same_files_are_sent_once_and_are_one_model(api, model_files):
    first = api.complete(model_files).json()
    again = api.http.post("/v1/uploads", json=api.manifest(model_files)).json()
    assert again["missing"] == []
    assert api.http.post(f"/v1/uploads/{again['id']}/complete").json()["id"] == first["id"]
    assert len(api.http.get("/v1/models").json()["items"]) == 1


def test_the_same_open_manifest_continues_the_upload(api, blob):
    path, data = blob
    api.http.patch(path, content=data[:100], headers={"Upload-Offset": "0"})
    again = api.http.post("/v1/uploads", json=api.manifest({"c.txt": data}, "calibration")).json()
    head = api.http.head(f"/v1/uploads/{again['id']}/blobs/{digest(data)}")
    assert head.headers["Upload-Offset"] == "100"


def test_a_blob_can_be_sent_in_pieces(api, blob):
    path, data = blob
    assert api.http.head(path).headers["Upload-Offset"] == "0"
    first = api.http.patch(path, content=data[:1000], headers={"Upload-Offset": "0"})
    assert (first.status_code, first.headers["Upload-Complete"]) == (204, "?0")
    head = api.http.head(path)
    assert (head.headers["Upload-Offset"], head.headers["Upload-Length"]) == ("1000", str(len(data)))
    last = api.http.patch(path, content=data[1000:], headers={"Upload-Offset": "1000"})
    assert last.headers["Upload-Complete"] == "?1"
    assert api.http.head(path).headers["Upload-Complete"] == "?1"
    assert api.context.store.path(digest(data)).read_bytes() == data


def test_a_wrong_offset_is_answered_with_the_right_one(api, blob):
    path, data = blob
    api.http.patch(path, content=data[:10], headers={"Upload-Offset": "0"})
    response = api.http.patch(path, content=data[20:], headers={"Upload-Offset": "20"})
    assert response.status_code == 409
    assert response.headers["Upload-Offset"] == "10"
    assert (response.json()["type"], response.json()["offset"]) == ("urn:bitplan:problem:wrong-offset", 10)


def test_put_begins_anew(api, blob):
    path, data = blob
    api.http.patch(path, content=b"x" * 10, headers={"Upload-Offset": "0"})
    assert api.http.put(path, content=data).headers["Upload-Complete"] == "?1"


def test_other_bytes_than_announced_are_refused_and_forgotten(api, blob):
    path, data = blob
    response = api.http.put(path, content=b"x" * len(data))
    assert response.status_code == 409
    assert response.json()["type"].endswith("digest-mismatch")
    assert api.http.head(path).headers["Upload-Offset"] == "0"
    assert not api.context.store.has(digest(data))


@pytest.mark.parametrize("declared", [True, False])
def test_more_bytes_than_declared_are_refused(api, blob, declared):
    path, data = blob
    body = data + b"x"
    content = body if declared else iter([body[:5000], body[5000:]])
    response = api.http.put(path, content=content)
    assert response.status_code == 413
    assert response.json()["type"].endswith("too-large")
    assert not api.context.store.has(digest(data))


def test_a_body_that_never_ends_is_cut_at_the_declared_size(api, blob):
    path, data = blob
    taken = []

    def endless():
        while True:
            taken.append(b"x" * 2**16)
            yield taken[-1]

    assert len(data) < 2**16
    response = api.http.put(path, content=itertools.islice(endless(), 64))
    assert (response.status_code, response.json()["type"]) == (413, "urn:bitplan:problem:too-large")
    assert api.http.head(path).headers["Upload-Offset"] == "0"


def test_a_body_that_stops_coming_is_ended_and_can_be_resumed(api, blob, monkeypatch):
    path, data = blob
    monkeypatch.setattr(blob_stream, "PATIENCE_SECONDS", 0.05)
    status, headers, problem = api.http.portal.call(stalled, api.http.app, path, data[:1000])
    assert (status, json.loads(problem)["type"]) == (408, "urn:bitplan:problem:body-too-slow")
    assert headers[b"connection"] == b"close"
    assert api.http.head(path).headers["Upload-Offset"] == "1000"
    rest = api.http.patch(path, content=data[1000:], headers={"Upload-Offset": "1000"})
    assert rest.headers["Upload-Complete"] == "?1"


@pytest.mark.parametrize("size", [2**26, pytest.param(2**30, marks=pytest.mark.slow)])
def test_a_large_body_is_taken_in_constant_memory(api, size):
    chunk = bytes(2**16)
    whole = hashlib.sha256()
    for _ in range(size // len(chunk)):
        whole.update(chunk)
    manifest = {"path": "c.txt", "size": size, "sha256": whole.hexdigest()}
    upload = api.http.post("/v1/uploads", json={"purpose": "calibration", "files": [manifest]}).json()
    path = f"/v1/uploads/{upload['id']}/blobs/{whole.hexdigest()}"
    tracemalloc.start()
    status, headers, _ = api.http.portal.call(streamed, api.http.app, path, chunk, size // len(chunk))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (status, headers[b"upload-complete"]) == (204, b"?1")
    assert api.context.store.size(whole.hexdigest()) == size
    assert peak < 2**23


def test_a_full_disk_is_told_and_the_upload_goes_on_later(api, blob, monkeypatch):
    path, data = blob
    api.http.patch(path, content=data[:1000], headers={"Upload-Offset": "0"})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(PartialWriter, "write", full)
        response = api.http.patch(path, content=data[1000:], headers={"Upload-Offset": "1000"})
    assert (response.status_code, response.json()["type"]) == (507, "urn:bitplan:problem:disk-full")
    assert not api.context.store.has(digest(data))
    assert api.http.head(path).headers["Upload-Offset"] == "1000"
    rest = api.http.patch(path, content=data[1000:], headers={"Upload-Offset": "1000"})
    assert rest.headers["Upload-Complete"] == "?1"


def test_an_empty_blob_can_be_sent(api):
    upload = api.http.post("/v1/uploads", json=api.manifest({"c.txt": b""}, "calibration")).json()
    path = f"/v1/uploads/{upload['id']}/blobs/{digest(b'')}"
    assert api.http.put(path, content=b"").headers["Upload-Complete"] == "?1"


def test_a_blob_outside_the_manifest_is_unknown(api, blob):
    path, _ = blob
    other = path[:-64] + digest(b"other")
    assert api.http.put(other, content=b"other").json()["type"].endswith("blob-not-in-manifest")
    assert api.http.head(other).status_code == 404


def test_an_incomplete_upload_cannot_be_completed(api, model_files):
    upload = api.http.post("/v1/uploads", json=api.manifest(model_files)).json()
    response = api.http.post(f"/v1/uploads/{upload['id']}/complete")
    assert response.status_code == 409
    assert response.json()["missing"] == upload["missing"]


@pytest.mark.parametrize(
    ("names", "purpose", "status", "slug"),
    [
        (["config.json", "../m.safetensors"], "model", 422, "invalid-path"),
        (["config.json", "CONFIG.json", "m.safetensors"], "model", 422, "invalid-path"),
        (["config.json", "pytorch_model.bin"], "model", 415, "unsupported-file"),
        (["model.zip"], "model", 415, "unsupported-file"),
        (["config.json", "m.safetensors", "x.py"], "model", 422, "remote-code"),
        (["config.json"], "model", 422, "missing-file"),
        (["m.safetensors"], "model", 422, "missing-file"),
        (["a.txt", "b.txt"], "calibration", 422, "invalid-manifest"),
        (["a.npy"], "calibration", 415, "unsupported-file"),
        ([], "model", 422, "invalid-request"),
    ],
)
def test_a_bad_manifest_is_refused(api, names, purpose, status, slug):
    response = api.http.post(
        "/v1/uploads", json=api.manifest({name: name.encode() for name in names}, purpose)
    )
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"urn:bitplan:problem:{slug}")
    assert "Got" in problem["detail"]


@pytest.mark.parametrize(
    "change", [{"sha256": "ABC"}, {"size": -1}, {"size": "12"}, {"extra": 1}, {"size": 1.5}]
)
def test_a_bad_line_is_refused_with_its_pointer(api, model_files, change):
    manifest = api.manifest(model_files)
    manifest["files"][1].update(change)
    response = api.http.post("/v1/uploads", json=manifest)
    assert response.status_code == 422
    assert response.json()["pointer"] == f"/files/1/{next(iter(change))}"


def test_one_digest_has_one_size(api, model_files):
    manifest = api.manifest(model_files)
    manifest["files"].append(manifest["files"][0] | {"path": "vocab.json", "size": 7})
    assert "one size" in api.http.post("/v1/uploads", json=manifest).json()["detail"]


def test_an_upload_has_a_largest_size(api, model_files):
    manifest = api.manifest(model_files)
    manifest["files"][0]["size"] = 2**40
    assert api.http.post("/v1/uploads", json=manifest).status_code == 413


@pytest.mark.parametrize(
    ("name", "content", "slug"),
    [
        ("model.safetensors", b"\x80\x04\x95" + b"." * 50, "invalid-safetensors"),
        ("model.safetensors", b"PK\x03\x04" + b"." * 50, "invalid-safetensors"),
        ("config.json", b'{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}', "remote-code"),
        ("config.json", b'{"model_type": "llama", "quantization_config": {"bits": 4}}', "already-quantized"),
        ("config.json", b"{}", "invalid-config"),
    ],
)
def test_bad_files_are_refused_when_the_upload_is_completed(api, model_files, name, content, slug):
    response = api.complete(model_files | {name: content})
    assert (response.status_code, response.json()["type"]) == (422, f"urn:bitplan:problem:{slug}")
    assert api.http.get("/v1/models").json()["items"] == []


def test_wrong_shapes_are_refused(api, model_files, make_safetensors, make_floats):
    dtype, _, data = make_floats(4, 4)
    wrong = make_safetensors({"a.weight": (dtype, [4, 5], data)})
    response = api.complete(model_files | {"model.safetensors": wrong})
    assert "shape [4, 5]" in response.json()["detail"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.txt", b"", "empty"),
        ("c.txt", b"\n\n\n", "empty"),
        ("c.txt", b"good\n\xff\xfe\n", "row 2"),
        ("c.jsonl", b'{"text": "a"}\n{"words": 1}\n', "row 2"),
        ("c.jsonl", b"{nonsense\n", "row 1"),
        ("c.safetensors", b"\x80\x04.........", "pickle"),
    ],
)
def test_bad_calibration_data_is_refused_with_the_row(api, name, content, words):
    response = api.complete({name: content}, "calibration")
    assert (response.status_code, response.json()["type"]) == (422, "urn:bitplan:problem:invalid-calibration")
    assert words in response.json()["detail"]


def test_too_few_samples_are_refused(api, make_safetensors, make_floats):
    response = api.complete({"c.safetensors": make_safetensors({"x": make_floats(2, 3)})}, "calibration")
    assert "at least 6 samples" in response.json()["detail"]


def test_calibration_data_are_ready_at_once_and_known_again(api, make_safetensors, make_floats):
    files = {"c.safetensors": make_safetensors({"x": make_floats(9, 3)})}
    first = api.complete(files, "calibration").json()
    assert (first["state"], first["kind"], first["summary"]["rows"]) == ("ready", "safetensors", 9)
    assert api.complete(files, "calibration").json()["id"] == first["id"]


def npz(**arrays):
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.array(values) for name, values in arrays.items()})
    return buffer.getvalue()


def test_calibration_arrays_are_taken_without_pickles(api):
    response = api.complete({"c.npz": npz(pixel_values=[[0.5, 1.0]] * 8)}, "calibration")
    assert response.status_code == 201, response.text
    assert (response.json()["kind"], response.json()["state"]) == ("npz", "ready")
    assert response.json()["summary"]["tensors"] == {"pixel_values": {"dtype": "F64", "shape": [8, 2]}}
    for arrays, words in (
        ({"x": [{}] * 8}, "array 'x' must hold numbers. Got objects"),
        ({"x": [0.0] * 7 + [float("nan")]}, "row 7"),
        ({"x": [0.0] * 3}, "at least 6 samples"),
    ):
        problem = api.complete({"c.npz": npz(**arrays)}, "calibration").json()
        assert problem["type"].endswith("invalid-calibration")
        assert words in problem["detail"]


def table_file(**columns):
    import io

    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def test_texts_in_a_parquet_file_become_json_lines(api):
    pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    rows = [f"some words of row {number}" for number in range(8)]
    found = api.complete({"texts.parquet": table_file(text=rows)}, "calibration").json()
    assert (found["kind"], found["state"], found["summary"]["rows"]) == ("jsonl", "ready", 8)
    [file], sent = found["source"]["files"], found["source"]["sent"]
    assert (file["path"], sent["path"]) == ("texts.jsonl", "texts.parquet")
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    assert (file["sha256"], file["size"]) == (hashlib.sha256(lines).hexdigest(), len(lines))
    again = api.complete({"other.parquet": table_file(text=rows, more=rows)}, "calibration").json()
    assert again["id"] == found["id"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["words"] * 7 + [""]}, '"text" of row 8'),
        ({"text": [1] * 8}, '"text" of row 1'),
        ({"words": ["a"] * 8}, "must have a column text"),
        ({"messages": [[{"role": "user"}]] * 8}, "each message of row 1"),
    ],
)
def test_bad_rows_of_a_parquet_file_are_named(api, columns, words):
    pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    problem = api.complete({"c.parquet": table_file(**columns)}, "calibration").json()
    assert problem["type"].endswith("invalid-calibration")
    assert words in problem["detail"]
