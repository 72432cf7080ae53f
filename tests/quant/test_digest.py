import hashlib
import json

import pytest

from quant.digest import FolderError, canonical_json, digest, folder_digest, weight_files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def write_index(folder, names):
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {f"tensor{index}": name for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_digest_is_sha256_of_sorted_json_without_spaces():
    assert digest({"b": "ä", "a": 1}) == hashlib.sha256('{"a":1,"b":"ä"}'.encode()).hexdigest()


def test_canonical_json_refuses_what_json_has_no_word_for():
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_manifest_lists_size_and_digest_of_every_file_that_counts(folder):
    found, manifest = folder_digest(folder)
    assert [entry["path"] for entry in manifest] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert manifest[1] == {
        "path": "model.safetensors",
        "size": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    assert found == digest(manifest)


@pytest.mark.parametrize("name", ["README.md", "bitplan_plan.json", "calibration.safetensors", "notes.txt"])
def test_other_files_change_nothing(folder, name):
    before = folder_digest(folder)
    (folder / name).write_text("anything")
    assert folder_digest(folder) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"])
def test_weights_config_and_tokenizer_change_the_digest(folder, name):
    before, _ = folder_digest(folder)
    (folder / name).write_text("changed")
    assert folder_digest(folder)[0] != before


def test_shards_come_from_the_index(folder):
    write_index(folder, ["b.safetensors", "a.safetensors", "b.safetensors"])
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    assert weight_files(folder) == ("a.safetensors", "b.safetensors")
    assert "model.safetensors.index.json" in {entry["path"] for entry in folder_digest(folder)[1]}


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", ""]
)
def test_an_index_may_not_point_elsewhere(folder, name):
    write_index(folder, [name])
    with pytest.raises(FolderError, match=r"must name plain \*\.safetensors files of its own folder"):
        folder_digest(folder)


def test_missing_pieces_are_named(folder, tmp_path_factory):
    write_index(folder, ["gone.safetensors"])
    with pytest.raises(FolderError, match=r"Got no 'gone\.safetensors'"):
        folder_digest(folder)
    write_index(folder, [])
    with pytest.raises(FolderError, match="at least one weight file"):
        folder_digest(folder)
    with pytest.raises(FolderError, match="must be a folder"):
        folder_digest(folder / "nowhere")
    with pytest.raises(FolderError, match=r"must hold config\.json"):
        folder_digest(tmp_path_factory.mktemp("empty"))


def test_pickles_are_not_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FolderError, match=r"only pytorch_model\.bin.*pickles are never read"):
        folder_digest(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(folder, text):
    write_index(folder, ["a.safetensors"])
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FolderError, match="must be JSON with a weight_map"):
        folder_digest(folder)
