from __future__ import annotations

import json
import os

import pytest

from service.ingest.local_folder import allowed_folder, model_files_in, open_plain


@pytest.fixture
def root(tmp_path, sound_model):
    folder = tmp_path / "models" / "good"
    folder.mkdir(parents=True)
    for name, data in sound_model.items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("read me")
    return tmp_path / "models"


def test_a_folder_inside_the_allow_list_is_found(root):
    assert allowed_folder(str(root / "good"), [root]) == root / "good"
    paths, left_out = model_files_in(root / "good")
    assert [path.name for path in paths] == ["config.json", "model.safetensors"]
    assert left_out == ()


@pytest.mark.parametrize("folder", ["/etc", "relative", "{root}/../..", "{root}x", "{root}/link"])
def test_other_folders_are_refused(root, problem_of, folder):
    (root / "link").symlink_to("/etc")
    problem = problem_of(allowed_folder, folder.format(root=root), [root])
    assert problem.slug == "folder-not-allowed"


def test_nothing_is_allowed_by_default(root, problem_of):
    assert problem_of(allowed_folder, str(root / "good"), []).slug == "folders-not-offered"


def test_a_missing_folder_is_named(root, problem_of):
    assert problem_of(allowed_folder, str(root / "none"), [root]).status == 404


def test_links_and_pipes_are_refused(root, problem_of):
    (root / "good" / "tokenizer.json").symlink_to("/etc/hostname")
    assert problem_of(model_files_in, root / "good").slug == "invalid-path"
    (root / "good" / "tokenizer.json").unlink()
    os.mkfifo(root / "good" / "vocab.json")
    assert problem_of(model_files_in, root / "good").slug == "invalid-path"


def test_a_second_name_of_a_file_is_refused(root, tmp_path, problem_of):
    (tmp_path / "private.json").write_text("{}")
    os.link(tmp_path / "private.json", root / "good" / "tokenizer.json")
    problem = problem_of(model_files_in, root / "good")
    assert (problem.slug, "'tokenizer.json'" in problem.detail) == ("invalid-path", True)


def test_programs_and_pickles_beside_the_weights_are_refused(root, problem_of):
    (root / "good" / "modeling.py").write_text("")
    assert problem_of(model_files_in, root / "good").slug == "remote-code"
    (root / "good" / "modeling.py").unlink()
    (root / "good" / "pytorch_model.bin").write_bytes(b"")
    assert problem_of(model_files_in, root / "good").status == 415


def test_a_file_that_became_a_link_is_not_followed(root):
    path = root / "good" / "vocab.json"
    path.symlink_to("/etc/hostname")
    with pytest.raises(OSError):
        open_plain(path)


def test_a_file_that_became_a_pipe_or_second_name_is_not_read(root, problem_of):
    path, weights = root / "good" / "vocab.json", root / "good" / "model.safetensors"
    os.mkfifo(path)
    assert problem_of(open_plain, path).slug == "invalid-path"
    path.unlink()
    os.link(weights, path)
    assert problem_of(open_plain, path).slug == "invalid-path"


def test_weights_that_the_index_does_not_name_are_left_out(root):
    folder = root / "good"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"another form of the same weights")
    assert model_files_in(folder)[1] == (), "without an index both are judged"
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    paths, left_out = model_files_in(folder)
    assert left_out == ("consolidated.safetensors",)
    assert {path.name for path in paths} == {
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }


def test_a_single_file_wins_over_others_and_an_index(root, problem_of):
    folder = root / "good"
    (folder / "model.fp16.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text("{}")
    paths, left_out = model_files_in(folder)
    assert [path.name for path in paths] == ["config.json", "model.safetensors"]
    assert left_out == ("model.fp16.safetensors", "model.safetensors.index.json")


def test_an_index_that_names_nothing_here_covers_nothing(root, problem_of):
    folder = root / "good"
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    for content in ('{"weight_map": {"w": "../outside.safetensors"}}', '{"weight_map": {}}', "{}"):
        (folder / "model.safetensors.index.json").write_text(content)
        assert model_files_in(folder)[1] == ()
    (folder / "model.safetensors.index.json").write_text("[")
    assert problem_of(model_files_in, folder).slug == "invalid-shard-index"
