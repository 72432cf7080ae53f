from __future__ import annotations

import json
import pickle

import pytest

from service.ingest import companions
from service.ingest.companions import check_companion
from service.ingest.model_folder import check_model

TOKENIZER = {"version": "1.0", "added_tokens": [{"id": 2, "content": "<s>"}], "model": {"vocab": {"a": 0}}}


def encoded(value) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def test_files_of_a_usual_tokenizer_pass(sound_model, on_disk):
    beside = {
        "tokenizer.json": encoded(TOKENIZER | {"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}),
        "tokenizer_config.json": encoded({"tokenizer_class": "LlamaTokenizer", "model_max_length": 10**30}),
        "special_tokens_map.json": encoded({"bos_token": "<s>"}),
        "added_tokens.json": encoded({"<mask>": 7}),
        "vocab.json": encoded({"auto_map": 0, "use_kernels": 1}),
        "merges.txt": "#version: 0.2\nĠ t\n".encode(),
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2",
        "preprocessor_config.json": encoded({"size": {"height": 224}}),
    }
    assert check_model(on_disk(sound_model | beside)).tensors == 2


@pytest.mark.parametrize(
    ("name", "content", "slug", "words"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "remote-code", "auto_map"),
        ("tokenizer_config.json", {"trust_remote_code": True}, "remote-code", "trust_remote_code"),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "x.Y"}}, "remote-code", "auto_map"),
        ("processor_config.json", {"sub": [{"auto_map": {}}]}, "remote-code", "auto_map"),
        ("generation_config.json", {"trust_remote_code": True}, "remote-code", "generation_config.json"),
        ("tokenizer_config.json", [1], "invalid-tokenizer", "must be a JSON object"),
        ("tokenizer_config.json", b"\x80\x04.", "invalid-tokenizer", "invalid byte"),
        ("tokenizer.json", b"{" * 10**5, "invalid-tokenizer", "nested levels"),
        ("tokenizer.json", b'{"model": {}, "model": {}}', "invalid-tokenizer", "'model' twice"),
        ("tokenizer.json", {}, "invalid-tokenizer", "object with a model"),
        ("tokenizer.json", TOKENIZER | {"model": {"vocab": {"a": -1}}}, "invalid-tokenizer", "-1 at /model/"),
        ("tokenizer.json", TOKENIZER | {"model": {"vocab": {"a": 2**31}}}, "invalid-tokenizer", "numbered"),
        ("tokenizer.json", TOKENIZER | {"added_tokens": [{"id": 2**40}]}, "invalid-tokenizer", "numbered"),
        ("tokenizer.json", TOKENIZER | {"added_tokens": [3]}, "invalid-tokenizer", "/added_tokens/0"),
        ("vocab.json", {"a": "0"}, "invalid-tokenizer", "numbered from 0"),
        ("added_tokens.json", {"a": True}, "invalid-tokenizer", "numbered from 0"),
        ("merges.txt", b"\xff\xfe", "invalid-tokenizer", "invalid byte at 0"),
        ("chat_template.jinja", b"a\xff", "invalid-tokenizer", "invalid byte at 1"),
        ("tokenizer.model", pickle.dumps([1]), "invalid-tokenizer", "a pickle"),
    ],
)
def test_hostile_tokenizers_and_processors_are_refused(
    sound_model, on_disk, problem_of, name, content, slug, words
):
    problem = problem_of(check_model, on_disk(sound_model | {name: encoded(content)}))
    assert (problem.status, problem.slug) == (422, slug)
    assert words in problem.detail
    assert name in problem.detail


def test_a_file_beyond_its_size_is_not_read(tmp_path, problem_of, monkeypatch):
    monkeypatch.setattr(companions, "LARGEST_VOCABULARY", 10)
    (tmp_path / "vocab.json").write_bytes(b" " * 11)
    assert "at most 10 bytes" in problem_of(check_companion, "vocab.json", tmp_path / "vocab.json").detail
