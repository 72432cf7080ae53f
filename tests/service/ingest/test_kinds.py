from __future__ import annotations

import pytest

from service.errors import ServiceError
from service.ingest.kinds import calibration_kind, check_model_files

SOUND = ["config.json", "model.safetensors"]


def test_a_sound_model_passes():
    check_model_files(
        [*SOUND, "model.safetensors.index.json", "tokenizer.json", "merges.txt", "chat_template.jinja"]
    )


@pytest.mark.parametrize(
    ("name", "status", "instead"),
    [
        ("model.zip", 415, "unpacked files"),
        ("model.tar.gz", 415, "unpacked files"),
        ("pytorch_model.bin", 415, "bitplan convert"),
        ("model.pt", 415, "bitplan convert"),
        ("model.PTH", 415, "bitplan convert"),
        ("weights.pkl", 415, "can run code"),
        ("model.torchscript", 415, "can run code"),
        ("model.pt2", 415, "torch.export, which runs code of its own when it is loaded"),
        ("model.pt2", 415, "Send the Hugging Face folder that it was exported from"),
        ("model_index.json", 415, "folder of its unet or transformer"),
        ("model.onnx", 415, "original Hugging Face folder"),
        ("model.gguf", 415, "original Hugging Face folder"),
        ("notes.md", 415, "Leave it out"),
        ("modeling_mine.py", 422, "--factory"),
        ("kernel.so", 422, "--factory"),
    ],
)
def test_other_files_are_refused_with_what_to_send_instead(name, status, instead):
    with pytest.raises(ServiceError) as caught:
        check_model_files([*SOUND, name])
    assert caught.value.status == status
    assert instead in caught.value.detail
    assert caught.value.pointer == "/files/2/path"


@pytest.mark.parametrize(
    ("names", "missing"), [(["config.json"], "*.safetensors"), (["a.safetensors"], "config.json")]
)
def test_a_missing_file_is_named(names, missing):
    with pytest.raises(ServiceError, match=r"A model must have") as caught:
        check_model_files(names)
    assert caught.value.slug == "missing-file"
    assert caught.value.extra == {"missing": [missing]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("c.txt", "text"),
        ("C.JSONL", "jsonl"),
        ("c.safetensors", "safetensors"),
        ("c.npz", "npz"),
        ("c.parquet", "parquet"),
    ],
)
def test_the_kind_of_calibration_data_is_in_its_name(name, kind):
    assert calibration_kind([name]) == kind


@pytest.mark.parametrize(("name", "instead"), [("c.npy", "Send safetensors"), ("c.csv", "Send parquet")])
def test_other_calibration_files_are_refused(name, instead):
    with pytest.raises(ServiceError, match=instead) as caught:
        calibration_kind([name])
    assert caught.value.status == 415


def test_a_calibration_set_is_one_file():
    with pytest.raises(ServiceError, match=r"exactly one file. Got 2"):
        calibration_kind(["a.txt", "b.txt"])
