from __future__ import annotations

import pytest

from service.errors import Unprocessable
from service.ingest.paths import check_path, check_paths


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "model-00001-of-00002.safetensors",
        "sentencepiece.bpe.model",
        "modèle.txt",
        "my data.jsonl",
        ".hidden.json",
    ],
)
def test_plain_names_are_taken(path):
    check_path(path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "empty"),
        ("../x.safetensors", "'/'"),
        ("/etc/passwd", "'/'"),
        ("sub/config.json", "'/'"),
        ("C:\\x", "':'"),
        ("a\\b", "\\\\"),
        ("%2e%2e", "'%'"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\u202etxt.py", "invisible"),
        ("a\u200bb", "invisible"),
        ("x" * 300, "300 characters"),
        ("..", "folder"),
        (".", "folder"),
        (" a", "space"),
        ("a ", "space"),
        ("a.", "dot"),
        ("CON", "device"),
        ("nul.safetensors", "device"),
        ("cafe\u0301.txt", "normalization"),
    ],
)
def test_other_names_are_refused_with_the_reason(path, reason):
    with pytest.raises(Unprocessable, match="plain file name") as caught:
        check_path(path)
    assert caught.value.slug == "invalid-path"
    assert reason in caught.value.detail
    assert "Send the files of the model folder itself" in caught.value.detail


def test_names_equal_but_for_case_are_refused_with_the_place():
    with pytest.raises(Unprocessable, match="upper and lower case") as caught:
        check_paths(["config.json", "a.txt", "Config.JSON"])
    assert caught.value.pointer == "/files/2/path"


def test_a_repeated_name_is_refused():
    with pytest.raises(Unprocessable):
        check_paths(["config.json", "config.json"])


def test_a_long_name_is_shortened_in_the_message():
    with pytest.raises(Unprocessable) as caught:
        check_path("y" * 5000)
    assert len(caught.value.detail) < 500
