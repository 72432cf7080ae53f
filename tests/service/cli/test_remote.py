"""Commands that talk to a server, against a real one in this process that measures a tiny model."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file

from quant.plan import parse_plan
from service.cli.remote import _moment
from service.client import Client
from service.remote import upload
from service.remote.handles import JobHandle
from service.remote.transport import ProblemError

Tiny = Callable[[str], Any]
Bitplan = Callable[..., Result]
Answer = Callable[..., Any]
Few = tuple[str, ...]


@pytest.fixture(autouse=True)
def address(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BITPLAN_SERVER", server)
    return server


@pytest.fixture(scope="module")
def finished(server: str, tiny: Tiny) -> str:
    """A finished job with a plan for "5 bpw"."""
    model = tiny("resnet")
    with Client(server) as client:
        options = {"schemes": "w2,w4,w8", "samples": 8, "evaluations": 2, "name": "mine"}
        return client.submit(model.folder, model.data, ["5 bpw"], **options).wait().id


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def test_submit_watches_and_writes(bitplan: Bitplan, tiny: Tiny, few: Few, tmp_path: Path) -> None:
    model = tiny("resnet")
    ask = ("submit", model.folder, "-c", model.data, "-b", "5 bpw", "-b", "6 bpw", *few)
    result = bitplan(*ask, "--watch", "-o", tmp_path / "plans")
    assert result.exit_code == 0, result.stderr
    assert "plan 5 bpw" in result.stdout
    files = sorted((tmp_path / "plans").iterdir())
    assert [file.name for file in files] == ["5-bpw.plan.json", "6-bpw.plan.json"]
    assert all(parse_plan(file.read_bytes()).assignment for file in files)


def test_a_cut_upload_goes_on_and_is_shown(
    bitplan: Bitplan, client: Client, tiny: Tiny, few: Few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = upload._chunks, []

    def once_cut(path: Path, offset: int, *told: Any) -> Iterator[bytes]:
        for chunk in whole(path, offset, *told):
            if told and path.suffix == ".safetensors" and not cut:
                cut.append(offset)
                yield chunk[:100]
                raise httpx2.WriteError("connection reset")
            yield chunk

    model = tiny("resnet")
    tensors = load_file(model.data)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "data.safetensors")
    monkeypatch.setattr(upload, "_chunks", once_cut)
    ask = ("submit", model.folder, "-c", tmp_path / "data.safetensors", "-b", "5 bpw", *few)
    result = bitplan(*ask)
    assert result.exit_code == 0, result.stderr
    assert cut == [0]
    assert "sending " in result.stderr
    [job] = re.findall(r"job_\w+", result.stdout)
    client.job(job).cancel()


def test_submit_and_run_give_the_same_plan(answer: Answer, tiny: Tiny, few: Few, tmp_path: Path) -> None:
    model = tiny("resnet")
    ask = (model.folder, "-c", model.data, "-b", "5 bpw", "--pin", "*.shortcut.convolution=w8", *few)
    [sent] = answer("submit", *ask, "-o", tmp_path / "sent.json")
    [own] = answer("run", *ask, "-o", tmp_path / "own.json")
    assert sent["digest"] == own["digest"]
    assert (tmp_path / "sent.json").read_bytes() == (tmp_path / "own.json").read_bytes()


def test_submit_without_watching_answers_at_once_and_takes_ids(
    answer: Answer, bitplan: Bitplan, client: Client, finished: str, few: Few
) -> None:
    request = client.job(finished).resource["request"]
    ask = ("submit", request["model"], "-c", request["calibration"], "-b", "7 bpw", *few)
    job = answer(*ask)
    assert job["request"]["budgets"] == ["7 bpw"]
    watched = bitplan("watch", job["id"])
    assert watched.exit_code == 0
    assert "7 bpw" in watched.stdout
    assert "forward passes of one sample" in watched.stdout


def test_submit_can_say_what_it_would_send(answer: Answer, tiny: Tiny, few: Few, client: Client) -> None:
    model, before = tiny("resnet"), len(client.jobs())
    found = answer("submit", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--seed", "5", "--dry-run")
    assert found["forwards"]["scoring"] > 0
    assert len(client.jobs()) == before


def test_lists(answer: Answer, bitplan: Bitplan, finished: str) -> None:
    assert finished in [job["id"] for job in answer("jobs")]
    assert "succeeded" in bitplan("jobs").stdout
    [model, *_] = answer("models")
    assert model["state"] == "ready"
    assert model["id"] in bitplan("models").stdout


def test_status_and_scores(answer: Answer, bitplan: Bitplan, finished: str) -> None:
    assert answer("status", finished)["state"] == "succeeded"
    assert bitplan("status", finished).stdout.startswith(f"{finished}  succeeded")
    rows = answer("scores", finished, "--metric", "output_kl")
    assert {row["metric"] for row in rows} == {"output_kl"}
    assert {row["scheme"] for row in rows} == {"w2", "w4", "w8"}
    assert rows[0]["layer"] in bitplan("scores", finished).stdout


def test_plan_solves_again_and_measures(
    answer: Answer, bitplan: Bitplan, finished: str, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    [solved] = answer("plan", finished, "--budget", "4.6 bpw", "--limit", "bytes<=1 MiB", "-o", out)
    assert solved["evidence"] is None
    assert parse_plan(out.read_bytes()).totals.bits_per_weight <= 4.6
    [measured] = answer("plan", finished, "-b", "4.6 bpw", "--limit", "bytes<=1 MiB", "--measure")
    assert measured["id"] == solved["id"]
    assert measured["evidence"]["part"] == "reporting"
    infeasible = bitplan("plan", finished, "-b", "1 bpw", "-b", "5 bpw", "-o", tmp_path / "plans")
    assert infeasible.exit_code == 3
    assert "Cannot hold together at 1 bpw (smallest set)" in infeasible.stdout
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["5-bpw.plan.json"]


def test_plans_with_pins_ties_and_another_metric(answer: Answer, finished: str) -> None:
    layers = {row["layer"] for row in answer("scores", finished)}
    first, second, third, *_ = sorted(layers)
    [plan] = answer(
        "plan", finished, "-b", "6 bpw", "--forbid", f"{third}=w8", "--pin", f"{first}=w2", "--tie", f"{second},{third}", "--metric",
        "gram_output",
    )  # fmt: skip
    chosen = plan["document"]["layers"]
    assert plan["metric"] == "gram_output"
    assert chosen[first]["scheme"] == "w2"
    assert chosen[second]["scheme"] == chosen[third]["scheme"] != "w8"
    assert plan["ask"]["forbid"] == {third: ["w8"]}


def test_cancel_and_resume(answer: Answer, bitplan: Bitplan, client: Client, tiny: Tiny, few: Few) -> None:
    model = tiny("llama")
    ask = ("submit", model.folder, "-c", model.data, "-b", "5 bpw", *few, "--sequence-length", "12")
    job = answer(*ask, "--metric", "hessian_trace", "--max-probes", "4000", "--relative-error", "0.0001")
    assert answer("cancel", job["id"])["state"] in ("cancelling", "cancelled")
    watched = bitplan("watch", job["id"])
    assert watched.exit_code == 1
    assert "cancelled" in watched.stderr
    assert answer("status", job["id"])["state"] == "cancelled"
    resumed = answer("resume", job["id"])
    assert resumed["predecessor"] == job["id"]
    assert answer("cancel", resumed["id"])["cancel_requested"]
    assert bitplan("watch", resumed["id"]).exit_code == 1


def test_a_job_that_failed_says_why(
    bitplan: Bitplan, answer: Answer, tiny: Tiny, few: Few, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("some words here\n" * 30)
    job = answer("submit", tiny("resnet").folder, "-c", lines, "-b", "5 bpw", *few)
    watched = bitplan("watch", job["id"], "--json")
    assert watched.exit_code == 2
    why = json.loads(watched.stdout)["error"]
    assert "must succeed. Got failed" in why
    shown = bitplan("status", job["id"])
    assert shown.exit_code == 0
    assert "failed" in shown.stdout
    assert "must be given tensors" in shown.stdout


def test_ctrl_c_leaves_the_job_running(
    bitplan: Bitplan, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> JobHandle:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobHandle, "wait", interrupt)
    result = bitplan("watch", finished)
    assert result.exit_code == 130
    assert "goes on at the server" in result.stderr


@pytest.mark.parametrize("command", ["status", "watch", "cancel", "resume", "scores"])
def test_unknown_jobs(bitplan: Bitplan, command: str) -> None:
    result = bitplan(command, "job_none", "--json")
    assert result.exit_code == 2
    assert "job_none" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "A budget must be given"),
        (["-b", "lots"], "at /budgets/0"),
        (["-b", "5 bpw", "--pin", "none=w4"], "none"),
        (["-b", "5 bpw", "--metric", "fisher"], "fisher"),
    ],
)
def test_bad_plans(bitplan: Bitplan, finished: str, arguments: list[str], words: str) -> None:
    result = bitplan("plan", finished, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_submissions(bitplan: Bitplan, tiny: Tiny, few: Few, tmp_path: Path) -> None:
    model = tiny("resnet")
    cases = {
        "Pass a Hugging Face folder": [tmp_path / "none", "-c", model.data, "-b", "5 bpw"],
        "Calibration must be": [model.folder, "-c", tmp_path / "none.txt", "-b", "5 bpw"],
        "at /budgets/0": [model.folder, "-c", model.data, "-b", "lots"],
        "at /metrics/0": [model.folder, "-c", model.data, "-b", "5 bpw", "--metric", "beauty"],
        "at /schemes/0": [model.folder, "-c", model.data, "-b", "5 bpw", "--schemes", "w99"],
    }
    for words, arguments in cases.items():
        result = bitplan("submit", *few, *arguments)
        assert result.exit_code == 2
        assert words in result.stderr


def test_a_server_that_is_not_there(bitplan: Bitplan) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = bitplan("jobs", "--server", f"http://127.0.0.1:{port}", "--json")
    assert result.exit_code == 1
    assert "bitplan serve" in json.loads(result.stdout)["error"]


def test_an_address_that_is_none(bitplan: Bitplan) -> None:
    result = bitplan("jobs", "--server", "localhost:8000")
    assert result.exit_code == 2
    assert "--server must be an address that begins with http://" in result.stderr


def test_a_checkpoint_of_the_server_has_the_bytes_of_one_written_here(
    bitplan: Bitplan, answer: Answer, client: Client, tiny: Tiny, tmp_path: Path
) -> None:
    """Of a plan whose quantizer goes by calibration data, which the server finds in its store."""
    model = tiny("llama")
    options = {"schemes": "w3-gptq,w4-gptq,w4-asym", "samples": 8, "sequence_length": 12, "evaluations": 1}
    fused = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    ties = [[f"model.layers.{block}.{name}" for name in names] for block in range(2) for names in fused]
    job = client.submit(model.folder, model.data, ["4 bpw"], ties=ties, **options).wait()
    plan = job.plan("4 bpw").save(tmp_path / "plan.json")
    assert parse_plan(plan.read_bytes()).needs_calibration
    own, sent = tmp_path / "own", tmp_path / "sent"
    answer(
        "checkpoint", model.folder, plan, "--to", "vllm", "-o", own, "--calibration", model.data
    )  # fmt: skip
    told = answer("checkpoint", job.id, "--to", "vllm", "-o", sent)
    assert {file.name: file.read_bytes() for file in sent.iterdir()} == {
        file.name: file.read_bytes() for file in own.iterdir()
    }
    written = client.job(told["job"])
    assert written.resource["progress"]["done"] == len(parse_plan(plan.read_bytes()).layers)
    assert [event["type"] for event in written.events()][-2:] == ["checkpoint", "succeeded"]
    assert told["layout"]["bytes"] == sum(file.stat().st_size for file in own.iterdir())
    in_use = bitplan("checkpoint", job.plan("4 bpw").id, "--to", "vllm", "-o", sent)
    assert in_use.exit_code == 1
    assert "must go to a new or empty place" in in_use.stderr
    refused = bitplan("checkpoint", "elsewhere", "--to", "vllm", "-o", tmp_path / "x")
    assert refused.exit_code == 2
    assert "Pass MODEL_DIR PLAN.json, or the id of a server's plan or job" in refused.stderr


def test_differences_are_those_of_paired_samples(
    answer: Answer, bitplan: Bitplan, client: Client, server: str, tiny: Tiny
) -> None:
    model = tiny("resnet")
    options = {"schemes": "w2,w4", "samples": 8, "evaluations": 0, "interactions": False}
    metrics = ("output_kl", "fisher", "weight_error", "hessian_trace")
    job = client.submit(
        model.folder, model.data, ["5 bpw"], metrics=metrics, max_probes=8, relative_error=1, **options
    ).wait()
    rows = job.scores(against="w4")
    values = {(row.layer, row.scheme, row.metric): row.value for row in rows}
    for row in rows:
        assert row.difference == row.value - values[row.layer, "w4", row.metric]
        if row.scheme == "w4":
            assert (row.difference, row.difference_stderr) in ((0, 0), (0, None))
        assert (row.difference_stderr is None) == (row.metric == "weight_error")
    # a Hessian trace is common to all schemes: its noise scales what they differ by, no more
    for row in rows:
        if row.metric == "hessian_trace" and row.scheme == "w2" and row.value:
            shares = row.difference_stderr / abs(row.difference), row.stderr / abs(row.value)
            assert shares[0] == pytest.approx(shares[1])
    assert job.scores("fisher")[0].difference is None
    told = bitplan("scores", job.id, "--metric", "fisher", "--against", "w4").stdout
    assert "difference_stderr" in told
    text = answer("scores", job.id, "--metric", "fisher", "--against", "w4")
    assert (
        text[0]["difference"]
        == rows[
            [(r.layer, r.scheme, r.metric) for r in rows].index(
                (text[0]["layer"], text[0]["scheme"], "fisher")
            )
        ].difference
    )
    refused = bitplan("scores", job.id, "--against", "w3")
    assert refused.exit_code == 2
    assert "against must be a scheme of the job: w2, w4" in refused.stderr


def test_correlations_of_a_finished_job(
    answer: Answer, bitplan: Bitplan, client: Client, finished: str
) -> None:
    job = client.job(finished)
    with pytest.raises(ProblemError, match="correlations"):
        job.correlations()
    asked = job.correlate(8)
    found = asked.wait().resource["summary"]
    assert job.correlate(8).id == asked.id
    assert job.correlations() == found
    assert answer("correlate", finished, "--plans", "8") == found
    assert found["job"] == finished
    assert "rank correlation with 8 random" in bitplan("correlate", finished, "--plans", "8").stdout
    other = answer("correlate", finished, "--plans", "8", "-b", "6 bpw", "--metric", "output_kl")
    assert [budget["budget"] for budget in other["budgets"]] == ["6 bpw"]
    assert bitplan("correlate", finished, "--plans", "2").exit_code == 2


def test_a_servers_plans_and_trade_offs_are_explained(
    bitplan: Bitplan, answer: Answer, client: Client, finished: str
) -> None:
    plan = client.job(finished).plan("5 bpw").id
    found = answer("explain", plan, "--draws", "20")
    assert (found["status"], found["stability"]["draws"]) == ("optimal", 20)
    assert len(found["decisions"]) > 3
    words = bitplan("explain", plan, "--draws", "20")
    assert "Gaussian rate-distortion reference, not a bound" in words.stdout
    corners = answer("frontier", finished)["items"]
    low, high = (corners[i]["resources"]["bytes"] for i in (1, 3))
    between = answer("frontier", finished, "--between", low, high)
    assert between["complete"] is True
    assert len(between["items"]) >= 3


@pytest.mark.parametrize(("text", "minutes"), [("90m", 90), ("6h", 360), ("2d", 2880), (None, None)], ids=str)
def test_a_deadline_from_now(text: str | None, minutes: int | None) -> None:
    before, found = datetime.now(UTC), _moment(text)
    if found is None or minutes is None:
        assert found is minutes
        return
    assert timedelta(0) <= found - before - timedelta(minutes=minutes) < timedelta(minutes=1)


def test_a_deadline_is_sent(bitplan: Bitplan, tiny: Tiny) -> None:
    model = tiny("resnet")
    given = ("submit", str(model.folder), "-c", str(model.data), "-b", "5 bpw", "--json")
    job = json.loads(bitplan(*given, "--deadline", "2d").stdout)
    assert datetime.fromisoformat(job["deadline"]) > datetime.now(UTC) + timedelta(days=1)
    for wrong in ("tomorrow", "2030-01-01", "9h30m"):
        refused = bitplan(*given, "--deadline", wrong)
        assert refused.exit_code == 2
        assert "--deadline must be a time from now" in refused.output
