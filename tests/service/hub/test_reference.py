from __future__ import annotations

import pytest

from service.hub.reference import BadReference, HubReference, parse_reference
from tests.service.hub_server import COMMIT


@pytest.mark.parametrize("text", [f"someone/model-1.5_x@{COMMIT}", f"a/b@{COMMIT}:unet", f"a/b@{COMMIT}:x/y"])
def test_references_are_spelled_and_read(text: str) -> None:
    assert parse_reference(text).text == text


@pytest.mark.parametrize(
    "repository",
    [
        "",
        "model",
        "https://huggingface.co/a/b",
        "file:///etc/passwd",
        "hf://a/b",
        "a/b/c",
        "../b",
        "a/..",
        "a/.b",
        "a/b.git",
        "a--b/c",
        "a/b c",
        "a/b\n",
        "a/b\0",
        "a/%2e%2e",
        "a/b?x=1",
        "a/b#c",
        "ä/b",
        "a/" + "b" * 97,
    ],
)
def test_what_is_no_repository_is_refused(repository: str) -> None:
    with pytest.raises(BadReference, match="must be owner/name, without a scheme") as caught:
        HubReference(repository, COMMIT)
    assert caught.value.member == "repository"


@pytest.mark.parametrize(
    ("commit", "why"),
    [
        ("", "branches and tags move"),
        ("main", "branches and tags move"),
        ("v1.0", "branches and tags move"),
        ("refs/pr/1", "branches and tags move"),
        ("../" + COMMIT, "branches and tags move"),
        (COMMIT[:7], "abbreviated"),
        (COMMIT[:39], "abbreviated"),
        (COMMIT.upper(), "upper-case"),
        (COMMIT + "0", "branches and tags move"),
        (COMMIT + "\n", "branches and tags move"),
    ],
)
def test_what_may_move_is_refused_with_how_to_find_the_commit(commit: str, why: str) -> None:
    with pytest.raises(BadReference, match=why) as caught:
        HubReference("someone/model", commit)
    assert "git ls-remote https://huggingface.co/someone/model" in str(caught.value)
    assert caught.value.member == "commit"


@pytest.mark.parametrize(
    "folder", ["/", "/unet", "unet/", "..", "a/../b", "a\\b", ".hidden", "a/b/c/d/e", "a b"]
)
def test_what_is_no_folder_is_refused(folder: str) -> None:
    with pytest.raises(BadReference, match="must be plain names") as caught:
        HubReference("someone/model", COMMIT, folder)
    assert caught.value.member == "folder"
