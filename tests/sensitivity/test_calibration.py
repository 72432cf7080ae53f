from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sensitivity.calibration import load_samples, split_parts
from sensitivity.errors import BadCalibration
from sensitivity.model_loading import load_model
from sensitivity.spec import DataSource, SessionSpec
from sensitivity.text import load_tokenizer, pack

CPU = torch.device("cpu")


def model_of(spec: SessionSpec) -> nn.Module:
    return load_model(spec.model, spec.task, CPU).model


def with_data(spec: SessionSpec, path: Path, kind: str) -> SessionSpec:
    return replace(spec, calibration=DataSource(str(path), kind, "d"))  # type: ignore[arg-type]


def tensors_spec(tiny: Any, name: str, tmp_path: Path, **tensors: Tensor) -> SessionSpec:
    save_file(tensors, tmp_path / "data.safetensors")
    return with_data(tiny(name).spec(), tmp_path / "data.safetensors", "safetensors")


@pytest.mark.parametrize(("count", "most"), [(6, 64), (7, 64), (100, 64), (1000, 64), (192, 64)])
def test_parts_are_disjoint_and_equally_long(count: int, most: int) -> None:
    parts = split_parts(count, most, 5)
    everything = parts.pop("all")
    assert len(set(everything.tolist())) == min(count, most)
    rows = np.concatenate(list(parts.values()))
    assert len(set(rows.tolist())) == len(rows)
    assert {len(part) for part in parts.values()} == {min(most, count // 3)}
    assert rows.min() >= 0
    assert rows.max() < count


def test_parts_depend_on_the_seed_alone() -> None:
    again, other = split_parts(50, 9, 1), split_parts(50, 9, 2)
    assert all((split_parts(50, 9, 1)[part] == again[part]).all() for part in again)
    assert any((again[part] != other[part]).any() for part in again)


def test_parts_never_change() -> None:
    """Stored scores were measured on these rows."""
    assert split_parts(12, 3, 0)["scoring"].tolist() == [9, 2, 7]


def test_text_is_packed_without_padding(tiny: Any) -> None:
    spec = tiny("llama").spec(sequence_length=10)
    samples = load_samples(spec, "causal_lm", model_of(spec))
    tokenizer = load_tokenizer(tiny("llama").folder)
    stream: list[int] = []
    for line in tiny("llama").data.read_text(encoding="utf-8").splitlines():
        stream += [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]
    tokens = samples.tensors["input_ids"]
    assert tokens.shape == (len(stream) // 10, 10)
    assert tokens.flatten().tolist() == stream[: tokens.numel()]
    assert set(samples.tensors) == {"input_ids"}


def test_no_more_text_is_read_than_needed() -> None:
    def endless() -> Any:
        while True:
            yield [1, 2, 3], None

    assert pack(endless(), 4, 7)[0].shape == (7, 4)


def test_rows_for_embeddings_are_padded_and_masked(tiny: Any) -> None:
    spec = tiny("bert").spec(sequence_length=8)
    samples = load_samples(spec, "sequence_embedding", model_of(spec))
    tokens, mask = samples.tensors["input_ids"], samples.tensors["attention_mask"]
    assert tokens.shape == mask.shape == (21, 8)
    assert set(tokens[mask == 0].tolist()) <= {0}
    assert 0 < int((mask == 0).sum()) < mask.numel()


def test_the_sequence_length_ends_where_positions_end(tiny: Any) -> None:
    spec = tiny("bert").spec(sequence_length=500)
    assert load_samples(spec, "sequence_embedding", model_of(spec)).tensors["input_ids"].shape[1] <= 32


def test_too_little_text_says_how_much_there_is(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("ba be bi\n")
    spec = with_data(tiny("llama").spec(), tmp_path / "x.txt", "text")
    with pytest.raises(
        BadCalibration, match=r"at least 6 samples.*4 tokens make 0 sequences of 12: send more text"
    ):
        load_samples(spec, "causal_lm", model_of(spec))


def test_messages_need_a_chat_template(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = {"messages": [{"role": "user", "content": "ba be"}, {"role": "assistant", "content": "bi"}]}
    path.write_text(json.dumps({"text": "ba"}) + "\n" + json.dumps(row))
    spec = with_data(tiny("llama").spec(), path, "jsonl")
    with pytest.raises(
        BadCalibration, match=r'row 2 holds "messages".* chat template.*send rows with "text"'
    ):
        load_samples(spec, "causal_lm", model_of(spec))


def test_messages_go_through_the_chat_template(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    row = {"messages": [{"role": "user", "content": "ba be"}, {"role": "assistant", "content": "bi"}]}
    path.write_text("\n".join([json.dumps(row)] * 30))
    spec = with_data(tiny("llama").spec(sequence_length=4), path, "jsonl")
    tokenizer = load_tokenizer(tiny("llama").folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} lo {% endfor %}"
    monkeypatch.setattr("sensitivity.text.load_tokenizer", lambda folder: tokenizer)
    tokens = load_samples(spec, "causal_lm", model_of(spec)).tensors["input_ids"]
    expected = [*tokenizer("ba be lo bi lo")["input_ids"], tokenizer.eos_token_id]
    assert tokens.flatten()[:12].tolist() == expected * 2


def test_text_needs_a_tokenizer(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("ba be bi\n" * 50)
    with pytest.raises(BadCalibration, match=r"tokenizer of a model folder. Got a factory"):
        load_samples(with_data(tiny("mlp").spec(), tmp_path / "x.txt", "text"), "generic", nn.Linear(2, 2))
    with pytest.raises(BadCalibration, match="image_classification must be given tensors"):
        load_samples(
            with_data(tiny("resnet").spec(), tmp_path / "x.txt", "text"),
            "image_classification",
            nn.Linear(2, 2),
        )
    with pytest.raises(BadCalibration, match="needs a tokenizer in the model folder"):
        load_samples(with_data(tiny("resnet").spec(), tmp_path / "x.txt", "text"), "generic", nn.Linear(2, 2))


def test_tokens_beyond_the_vocabulary_name_the_row(tiny: Any, tmp_path: Path) -> None:
    tokens = torch.ones(20, 12, dtype=torch.int32)
    tokens[7, 3] = 48
    spec = tensors_spec(tiny, "llama", tmp_path, input_ids=tokens)
    with pytest.raises(
        BadCalibration, match=r"'input_ids' must be below the vocabulary of 48. Got 48 in row 7"
    ):
        load_samples(spec, "causal_lm", model_of(spec))
    tokens[7, 3] = -1
    spec = tensors_spec(tiny, "llama", tmp_path, input_ids=tokens)
    with pytest.raises(BadCalibration, match="Got -1 in row 7"):
        load_samples(spec, "causal_lm", model_of(spec))


def test_floating_tokens_are_refused(tiny: Any, tmp_path: Path) -> None:
    spec = tensors_spec(tiny, "llama", tmp_path, input_ids=torch.ones(20, 12))
    with pytest.raises(BadCalibration, match="'input_ids' must hold whole numbers"):
        load_samples(spec, "causal_lm", model_of(spec))


def test_unknown_names_list_the_inputs(tiny: Any, tmp_path: Path) -> None:
    spec = tensors_spec(tiny, "resnet", tmp_path, images=torch.zeros(9, 1, 16, 16), extra=torch.zeros(9))
    with pytest.raises(
        BadCalibration, match=r"named after the model's inputs \(pixel_values.*Got extra, images"
    ):
        load_samples(spec, "image_classification", model_of(spec))


def test_a_single_unknown_name_goes_by_position(tiny: Any, tmp_path: Path) -> None:
    images = torch.randn(9, 1, 16, 16)
    spec = tensors_spec(tiny, "resnet", tmp_path, images=images, labels=torch.zeros(9, dtype=torch.int64))
    model = model_of(spec)
    samples = load_samples(spec, "image_classification", model)
    assert samples.positional == "images"
    batch = samples.batch(np.array([2, 0]), CPU, torch.float32)
    expected = model(pixel_values=images[[2, 0]]).logits
    torch.testing.assert_close(batch.call(model).logits, expected)
    assert batch.labels is not None


def test_floating_inputs_take_the_models_type(tiny: Any) -> None:
    spec = tiny("resnet").spec()
    samples = load_samples(spec, "image_classification", model_of(spec))
    batch = samples.batch(np.array([0]), CPU, torch.bfloat16)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64


def test_micro_batches_cover_a_part_in_order(tiny: Any) -> None:
    spec = tiny("resnet").spec()
    samples = load_samples(spec, "image_classification", model_of(spec))
    batches = list(samples.batches("choosing", 4, CPU, torch.float32))
    assert [batch.size for batch in batches] == [4, 2]
    joined = torch.cat([batch.inputs["pixel_values"] for batch in batches])
    torch.testing.assert_close(joined, samples.tensors["pixel_values"][samples.parts["choosing"]])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_the_samples_that_safetensors_give(tiny: Any, tmp_path: Path, save: Any) -> None:
    from safetensors.numpy import load_file

    model = tiny("resnet")
    save(tmp_path / "images.npz", **load_file(model.data))
    own, spec = model.spec(), with_data(model.spec(), tmp_path / "images.npz", "npz")
    wanted = load_samples(own, "image_classification", model_of(own))
    found = load_samples(spec, "image_classification", model_of(own))
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)
    assert found.labels is not None
    assert wanted.labels is not None
    assert torch.equal(found.labels, wanted.labels)
