"""What names a model of a hub: a repository, one commit of it, and a folder inside."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
COMMIT = re.compile(r"[0-9a-f]{40}")
DEEPEST_FOLDER = 4
SHOWN = 80


class BadReference(ValueError):  # noqa: N818 - named after what went wrong
    """No repository, commit or folder of a hub; `member` says which of the three."""

    def __init__(self, member: str, message: str) -> None:
        super().__init__(message)
        self.member = member


@dataclass(frozen=True)
class HubReference:
    """`repository` is owner/name, `commit` all 40 hexadecimal digits, `folder` "" for the root.

    >>> HubReference("someone/model", "0123456789" * 4, "unet").text
    'someone/model@0123456789012345678901234567890123456789:unet'
    """

    repository: str
    commit: str
    folder: str = ""

    def __post_init__(self) -> None:
        check_repository(self.repository)
        check_commit(self.commit, self.repository)
        check_folder(self.folder)

    @property
    def text(self) -> str:
        """As the command line spells it: the inverse of `parse_reference`."""
        return f"{self.repository}@{self.commit}" + (f":{self.folder}" if self.folder else "")

    @property
    def prefix(self) -> str:
        """What the names of its files begin with in the repository."""
        return f"{self.folder}/" if self.folder else ""

    def info_path(self) -> str:
        """Where the hub lists the files of the commit."""
        return f"/api/models/{self.repository}/revision/{self.commit}?blobs=true"

    def file_path(self, name: str) -> str:
        """Where the hub has a file of the folder."""
        return f"/{self.repository}/resolve/{self.commit}/{quote(self.prefix + name)}"

    def as_json(self) -> dict[str, str]:
        """Its members."""
        return {"repository": self.repository, "commit": self.commit, "folder": self.folder}


def parse_reference(text: str) -> HubReference:
    """The reference that OWNER/NAME@COMMIT or OWNER/NAME@COMMIT:FOLDER spells. Raises `BadReference`."""
    repository, _, rest = text.partition("@")
    commit, _, folder = rest.partition(":")
    return HubReference(repository, commit, folder)


def check_repository(text: str) -> str:
    """The text, if it is owner/name; a scheme, a path or a URL is none. Raises `BadReference`."""
    parts = text.split("/")
    sound = len(parts) == 2 and all(PART.fullmatch(part) for part in parts)
    if not sound or ".." in text or "--" in text or text.endswith(".git"):
        raise BadReference(
            "repository",
            "A hub repository must be owner/name, without a scheme, host or path. "
            f"Got {text[:SHOWN]!r}. Copy the name from the top of its page.",
        )
    return text


def check_commit(text: str, repository: str = "owner/name") -> str:
    """The text, if it is a whole commit id: branches and tags move, short ids are not unique. Raises
    `BadReference` that says how to find it.
    """
    if COMMIT.fullmatch(text):
        return text
    short = re.fullmatch(r"[0-9a-fA-F]{4,40}", text)
    what = "an abbreviated or upper-case commit" if short else "which is no commit: branches and tags move"
    raise BadReference(
        "commit",
        f"A hub commit must be all its 40 lowercase hexadecimal digits. Got {text[:SHOWN]!r}, {what}. Copy "
        f"it from the repository's history (Files and versions), or ask for it: git ls-remote "
        f"https://huggingface.co/{repository} {text[:SHOWN] if text.isidentifier() else 'main'}",
    )


def check_folder(text: str) -> str:
    """The text, if it is "" or plain names with slashes between. Raises `BadReference`."""
    parts = text.split("/") if text else []
    if len(parts) > DEEPEST_FOLDER or not all(PART.fullmatch(part) and ".." not in part for part in parts):
        raise BadReference(
            "folder",
            f"A folder of a hub repository must be plain names such as unet or transformer. Got "
            f"{text[:SHOWN]!r}. Leave it out for a model at the root.",
        )
    return text
