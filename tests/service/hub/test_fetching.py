"""A hub, honest and not, over real HTTP: what arrives is what its commit lists, or nothing does."""

from __future__ import annotations

import errno
import json
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from service.errors import ServiceError, slug_of
from service.hub.connection import HubConnection
from service.hub.fetching import Announced, Patience, announced, fetch, partial_id
from service.hub.place import HubPlace
from service.hub.reference import HubReference
from service.store.blobs import BlobStore
from service.store.partials import PartialWriter
from service.webhooks.guard import Guard
from tests.service.hub.conftest import WANTED, weights
from tests.service.hub_server import COMMIT, REPOSITORY, Hub, hub_serving, sha256

GIB = 2**30
LARGE = "model.safetensors"


@pytest.fixture
def bring(store: BlobStore, patience: Patience) -> Callable[..., Announced]:
    """bring(place): the files of the commit into the store."""

    def run(
        place: HubPlace, wanted: HubReference = WANTED, *, most: int = GIB, patient: float = 60.0, **more: Any
    ) -> Announced:
        with HubConnection(place, patience_seconds=patient) as connection:
            found = announced(connection, store, wanted, most, patience)
            fetch(connection, store, wanted, found.files, patience, **more)
        return found

    return run


def refused(action: Callable[[], Any]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        action()
    return caught.value


def stored(store: BlobStore) -> set[str]:
    return {path.name for path in (store.data_dir / "blobs").glob("*/??/*")}


def test_the_files_of_a_model_arrive_and_no_others(
    hub: Hub, place: HubPlace, store: BlobStore, bring: Any
) -> None:
    seen: list[tuple[int, int]] = []
    found = bring(place, on_bytes=lambda done, total: seen.append((done, total)))
    wanted = ["config.json", LARGE, "tokenizer.json"]
    assert found.files == tuple(
        {"path": name, "size": len(hub.files[name]), "sha256": sha256(hub.files[name])} for name in wanted
    )
    assert stored(store) == {sha256(hub.files[name]) for name in wanted}
    total = sum(len(hub.files[name]) for name in wanted)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert not [
        path for path in hub.paths("") if any(name in path for name in ("README", ".py", ".bin", "onnx"))
    ]
    assert hub.asked[0][0] == f"/api/models/{REPOSITORY}/revision/{COMMIT}?blobs=true"
    for _, headers in hub.asked:
        assert "cookie" not in headers
        assert "authorization" not in headers


def test_what_is_there_is_not_asked_for_again(hub: Hub, place: HubPlace, bring: Any) -> None:
    bring(place)
    hub.asked.clear()
    bring(place)
    assert not hub.paths("/cdn/")


def test_a_folder_of_a_pipeline(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.files = {"model_index.json": b"{}", "vae/config.json": b"{}"} | {
        f"unet/{name}": data
        for name, data in {
            "config.json": b'{"_class_name": "UNet2DModel"}',
            "diffusion_pytorch_model.safetensors": weights(weight=[8, 8]),
            "diffusion_pytorch_model.fp16.safetensors": weights(weight=[8, 8]),
            "deeper/model.safetensors": b"",
        }.items()
    }
    problem = refused(lambda: bring(place))
    assert (problem.slug, problem.extra) == ("missing-file", {"folders": ["unet", "vae"]})
    found = bring(place, HubReference(REPOSITORY, COMMIT, "unet"))
    assert [file["path"] for file in found.files] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert found.left_out == ("diffusion_pytorch_model.fp16.safetensors",)
    assert (
        refused(lambda: bring(place, HubReference(REPOSITORY, COMMIT, "text"))).slug == "hub-folder-not-found"
    )


def test_weights_that_the_index_does_not_name_stay_away(hub: Hub, place: HubPlace, bring: Any) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": weights(**{f"w{n}": [8, 8]}) for n in (1, 2)}
    index = {"weight_map": {f"w{n}": name for n, name in enumerate(shards, 1)}}
    del hub.files[LARGE]
    hub.files |= shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.files["consolidated.safetensors"] = weights(other=[512, 512])
    found = bring(place)
    assert {file["path"] for file in found.files} >= set(shards)
    assert found.left_out == ("consolidated.safetensors",)
    assert not hub.paths("consolidated")


def test_a_large_file_goes_on_where_it_broke(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.cut[LARGE] = 1000
    bring(place)
    assert [headers.get("range") for path, headers in hub.asked if "/cdn/" in path] == [None, "bytes=1000-"]


def test_a_hub_without_ranges_begins_anew(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.cut[LARGE], hub.ranges = 1000, False
    bring(place)
    assert len(hub.paths("/cdn/")) == 2


def test_a_busy_hub_is_asked_again_when_it_says(
    hub: Hub, place: HubPlace, bring: Any, patience: Patience
) -> None:
    waited: list[float] = []
    patience.wait = waited.append
    hub.statuses = [(429, {"Retry-After": "7"}), (503, {}), (500, {})]
    bring(place)
    assert waited == [7.0, 2.0, 4.0]


def test_a_pause_that_is_no_number_is_our_own(
    hub: Hub, place: HubPlace, bring: Any, patience: Patience
) -> None:
    waited: list[float] = []
    patience.wait = waited.append
    hub.statuses = [(503, {"Retry-After": "\N{SUPERSCRIPT TWO}"})]
    bring(place)
    assert waited == [1.0]


def test_a_hub_that_stays_away_is_told(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.statuses = [(503, {})] * 6
    problem = refused(lambda: bring(place))
    assert (problem.status, problem.slug) == (503, "hub-unavailable")
    assert "HTTP status 503 after 6 attempts" in problem.detail


def test_nobody_listens(bring: Any) -> None:
    with hub_serving({}) as gone:
        place = HubPlace(gone.url)
    assert refused(lambda: bring(place)).slug == "hub-unavailable"


@pytest.mark.parametrize(
    ("status", "headers", "slug"),
    [
        (401, {}, "hub-unauthorized"),
        (403, {"X-Error-Code": "GatedRepo"}, "hub-forbidden"),
        (403, {}, "hub-forbidden"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "hub-not-found"),
        (404, {}, "hub-not-found"),
    ],
)
def test_the_hubs_no_is_told_as_such(
    hub: Hub, place: HubPlace, bring: Any, status: int, headers: dict[str, str], slug: str
) -> None:
    hub.statuses = [(status, headers)]
    problem = refused(lambda: bring(place))
    assert (problem.status, problem.slug) == (status, slug)
    assert str(status) in problem.detail
    assert "own words" not in problem.detail


def test_missing_repositories_and_commits(place: HubPlace, bring: Any) -> None:
    assert refused(lambda: bring(place, HubReference("someone/else", COMMIT))).slug == "hub-unauthorized"
    assert refused(lambda: bring(place, HubReference(REPOSITORY, "f" * 40))).slug == "hub-not-found"


def test_the_token_goes_to_the_hub_alone(hub: Hub, bring: Any) -> None:
    hub.token = "hf_secret"
    with hub_serving(hub.files) as network:
        name = sha256(hub.files[LARGE])
        hub.redirect = f"{network.url}/cdn/{name}/{LARGE}"
        place = HubPlace(hub.url, (f"127.0.0.1:{network.port}",), "hf_secret")
        assert "hf_secret" not in repr(place)
        bring(place)
        assert {headers["authorization"] for _, headers in hub.asked} == {"Bearer hf_secret"}
        [(_, headers)] = network.asked
        assert "authorization" not in headers


@pytest.mark.parametrize(
    "redirect",
    [
        "http://127.0.0.1:{port}/x",
        "http://169.254.169.254/latest/meta-data",
        "https://localhost/x",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "//evil.example/x",
        "https://evil.example/x",
        "https://user:secret@evil.example/x",
        "https://[evil/x",
    ],
)
def test_redirects_to_other_hosts_are_refused(hub: Hub, place: HubPlace, bring: Any, redirect: str) -> None:
    with hub_serving({}) as other:
        hub.redirect = redirect.format(port=other.port)
        problem = refused(lambda: bring(place))
        assert (problem.status, problem.slug) == (409, "hub-mismatch")
        assert other.asked == []


def test_hosts_of_a_pattern_must_be_public(hub: Hub, bring: Any) -> None:
    """A name that resolves to this machine, or later to another address than was checked."""
    hub.redirect = "https://cdn.hf.example/x"
    guard = Guard(resolve=lambda host, port: ["127.0.0.1"])
    problem = refused(lambda: bring(HubPlace(hub.url, ("*.hf.example",), guard=Guard(resolve=guard.resolve))))
    assert "not public" in problem.detail
    hub.redirect = "http://cdn.hf.example/x"
    assert "must begin with https" in refused(lambda: bring(HubPlace(hub.url, ("*.hf.example",)))).detail


def test_the_well_known_endpoint_must_be_public() -> None:
    place = HubPlace("https://huggingface.co", guard=Guard(resolve=lambda host, port: ["10.0.0.1"]))
    with HubConnection(place) as connection:
        assert "not public" in refused(lambda: connection.read("/api")).detail


def test_redirects_without_end(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.statuses = [(302, {"Location": "/x"})] * 7
    assert "more than 5 redirects" in refused(lambda: bring(place)).detail


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info | {"sha": "f" * 40}, f"instead of {COMMIT}"),
        (lambda info: info | {"sha": None}, f"instead of {COMMIT}"),
        (lambda info: info | {"id": "someone/renamed"}, "'someone/renamed', its present name"),
        (lambda info: info | {"siblings": {}}, "no list"),
        (lambda info: info | {"siblings": [1]}, "leads out of the repository"),
        (lambda info: [], "must be a JSON object"),
        (lambda info: info | {"deep": eval("[" * 40 + "]" * 40)}, "nested levels"),
    ],
)
def test_what_a_hub_must_not_say_of_a_commit(
    hub: Hub, place: HubPlace, bring: Any, store: BlobStore, change: Any, said: str
) -> None:
    hub.change_info = change
    problem = refused(lambda: bring(place))
    assert problem.slug == "hub-mismatch"
    assert said in problem.detail
    assert stored(store) == set()


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/../../x", "a\\..\\x", "./x", "a//b", "x\0.json", "x" * 1001],
)
def test_names_that_lead_out_are_refused(hub: Hub, place: HubPlace, bring: Any, name: str) -> None:
    hub.files[name] = b"x"
    assert refused(lambda: bring(place)).slug == "hub-mismatch"
    assert len(hub.asked) == 1


def lying(name: str, **members: Any) -> Any:
    """Changes members of one file of the list; those of lfs by their names with a leading underscore."""

    def change(info: dict[str, Any]) -> dict[str, Any]:
        for entry in info["siblings"]:
            if entry["rfilename"] == name:
                own = {key: value for key, value in members.items() if not key.startswith("_")}
                entry.update(own)
                if "lfs" in entry:
                    entry["lfs"] |= {key[1:]: value for key, value in members.items() if key.startswith("_")}
        return info

    return change


@pytest.mark.parametrize(
    ("name", "members", "slug"),
    [
        (LARGE, {"size": 5, "_size": 5}, "hub-mismatch"),
        (LARGE, {"size": 10**6, "_size": 10**6}, "hub-mismatch"),
        (LARGE, {"size": 5}, "hub-mismatch"),
        (LARGE, {"size": -1, "_size": -1}, "hub-mismatch"),
        (LARGE, {"size": "1", "_size": "1"}, "hub-mismatch"),
        (LARGE, {"size": True, "_size": True}, "hub-mismatch"),
        (LARGE, {"size": None}, "hub-mismatch"),
        (LARGE, {"_sha256": "0" * 64}, "hub-mismatch"),
        (LARGE, {"_sha256": "../" + "0" * 61}, "hub-mismatch"),
        (LARGE, {"_sha256": None}, "hub-mismatch"),
        (LARGE, {"size": 2 * GIB, "_size": 2 * GIB}, "too-large"),
        (LARGE, {"size": 2**60, "_size": 2**60}, "hub-mismatch"),
        ("config.json", {"blobId": "0" * 40}, "hub-mismatch"),
        ("config.json", {"blobId": None}, "hub-mismatch"),
        ("config.json", {"size": 3}, "hub-mismatch"),
        ("config.json", {"size": 200_000_000}, "too-large"),
    ],
)
def test_sizes_and_digests_must_be_those_of_the_list(
    hub: Hub, place: HubPlace, bring: Any, store: BlobStore, name: str, members: Any, slug: str
) -> None:
    hub.change_info = lying(name, **members)
    assert refused(lambda: bring(place)).slug == slug
    assert sha256(hub.files[name]) not in stored(store)


@pytest.mark.parametrize("name", [LARGE, "config.json"])
def test_other_bytes_than_listed_are_refused(
    hub: Hub, place: HubPlace, bring: Any, store: BlobStore, name: str
) -> None:
    hub.change_body[name] = bytes(len(hub.files[name]))
    assert refused(lambda: bring(place)).slug == "hub-mismatch"
    assert sha256(hub.change_body[name]) not in stored(store)
    hub.change_body.clear()
    bring(place)


def test_the_pointer_of_a_large_file_is_not_the_file(hub: Hub, place: HubPlace, bring: Any) -> None:
    from tests.service.hub_server import pointer

    hub.change_body[LARGE] = pointer(hub.files[LARGE])
    assert "bytes of model.safetensors instead of" in refused(lambda: bring(place)).detail


def test_a_body_without_end_is_cut_at_the_listed_size(
    hub: Hub, place: HubPlace, bring: Any, store: BlobStore
) -> None:
    hub.endless = True
    assert "more than the" in refused(lambda: bring(place)).detail
    assert sha256(hub.files[LARGE]) not in stored(store)


def test_a_file_of_another_commit_is_refused(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.commit_header = "f" * 40
    assert f"of commit '{'f' * 40}'" in refused(lambda: bring(place)).detail


def test_a_body_that_drips_is_left(hub: Hub, place: HubPlace, bring: Any, patience: Patience) -> None:
    hub.slow, patience.tries = 0.05, 2
    problem = refused(lambda: bring(place, patient=0.5))
    assert (problem.status, problem.slug) == (503, "hub-unavailable")
    assert "less than 1048576 bytes in 0.5 seconds after 2 attempts" in problem.detail


def test_all_together_may_not_take_for_ever(hub: Hub, place: HubPlace, store: BlobStore) -> None:
    hub.slow = 0.01
    patience = Patience(wait=lambda seconds: None, seconds=0.3)
    with HubConnection(place) as connection:
        problem = refused(
            lambda: fetch(
                connection, store, WANTED, announced(connection, store, WANTED, GIB, patience).files, patience
            )
        )
    assert problem.slug == "hub-unavailable"


def test_waiting_can_be_left_at_once(hub: Hub, place: HubPlace, store: BlobStore, patience: Patience) -> None:
    hub.slow = 30.0
    stop = threading.Event()

    def pause() -> None:
        if hub.paths("/cdn/"):
            stop.set()
            raise InterruptedError("left")

    with HubConnection(place, pause) as connection, pytest.raises(InterruptedError):
        fetch(connection, store, WANTED, announced(connection, store, WANTED, GIB, patience).files, patience)
    assert stop.is_set()


def test_more_than_uploads_may_have(place: HubPlace, bring: Any) -> None:
    problem = refused(lambda: bring(place, most=100))
    assert (problem.status, problem.slug) == (413, "too-large")


def test_pickles_alone_are_told_what_to_send(hub: Hub, place: HubPlace, bring: Any) -> None:
    del hub.files[LARGE]
    problem = refused(lambda: bring(place))
    assert (problem.status, problem.slug) == (415, "unsupported-file")
    assert "'pytorch_model.bin', a pickle" in problem.detail
    assert "bitplan convert" in problem.detail
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    ("name", "content", "slug"),
    [
        ("config.json", b'{"model_type": "x", "auto_map": {}}', "remote-code"),
        ("config.json", b'{"model_type": "x", "quantization_config": {"bits": 4}}', "already-quantized"),
        ("config.json", b"nothing", "invalid-config"),
        ("tokenizer.json", b"\x80\x04pickle", "invalid-tokenizer"),
    ],
)
def test_small_files_are_judged_before_large_ones_are_asked_for(
    hub: Hub, place: HubPlace, bring: Any, name: str, content: bytes, slug: str
) -> None:
    hub.files[name] = content
    assert refused(lambda: bring(place)).slug == slug
    assert not hub.paths("/cdn/")


def test_a_full_disk_is_told_and_it_goes_on_later(
    place: HubPlace, bring: Any, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(PartialWriter, "write", full)
        problem = refused(lambda: bring(place))
    assert (problem.status, problem.slug) == (507, "disk-full")
    bring(place)


def test_two_may_fetch_the_same(hub: Hub, place: HubPlace, store: BlobStore, bring: Any) -> None:
    hub.files[LARGE] = weights(weight=[512, 512])
    held = store.partial(partial_id(WANTED), sha256(hub.files[LARGE]))
    waits: list[float] = []
    with HubConnection(place) as connection:
        patience = Patience(wait=waits.append)
        found = announced(connection, store, WANTED, GIB, patience)
        with held.append(0, 10) as writer:
            writer.write(hub.files[LARGE][:10])

            def release(seconds: float) -> None:
                waits.append(seconds)
                if len(waits) > 2:
                    raise InterruptedError("seen")

            patience.wait = release
            with pytest.raises(InterruptedError):
                fetch(connection, store, WANTED, found.files, patience)
        patience.wait = waits.append
        fetch(connection, store, WANTED, found.files, patience)
    assert sha256(hub.files[LARGE]) in stored(store)


def test_what_another_job_has_brought_meanwhile_is_not_fetched(
    hub: Hub, place: HubPlace, store: BlobStore, patience: Patience
) -> None:
    held = store.partial(partial_id(WANTED), sha256(hub.files[LARGE]))
    with HubConnection(place) as connection, held.append(0, 10):
        found = announced(connection, store, WANTED, GIB, patience)
        patience.wait = lambda seconds: store.put_bytes(hub.files[LARGE])
        fetch(connection, store, WANTED, found.files, patience)
        asked = len(hub.paths("/cdn/"))
        fetch(connection, store, WANTED, found.files, patience)
    assert len(hub.paths("/cdn/")) == asked <= 1


def test_a_large_file_comes_in_constant_memory(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.files[LARGE] = weights(weight=[4096, 2048])
    tracemalloc.start()
    bring(place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20 < len(hub.files[LARGE])


def test_a_proxy_of_the_environment_is_not_used(
    place: HubPlace, bring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    bring(place)


def test_pauses_grow_and_progress_begins_the_count_anew() -> None:
    from service.hub.connection import LEAST_BYTES, HubAway

    waits: list[float] = []
    gains = iter([0, LEAST_BYTES, 0, 0, 0])
    total = 0

    def action() -> str:
        nonlocal total
        gained = next(gains, None)
        if gained is None:
            return "done"
        total += gained
        raise HubAway("away")

    assert Patience(wait=waits.append, tries=5).persist(action, lambda: total) == "done"
    assert waits == [1.0, 1.0, 2.0, 4.0, 8.0]


def test_problems_have_the_form_of_others(hub: Hub, place: HubPlace, bring: Any) -> None:
    hub.statuses = [(404, {})]
    document = refused(lambda: bring(place)).as_json()
    assert slug_of(document) == "hub-not-found"
    assert document["pointer"] == "/hub"
