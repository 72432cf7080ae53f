"""What the store refuses, as one small tree.

StoreError(ValueError)
  BlobMissing             no blob has this digest
  DigestMismatch          the bytes are not the ones that were announced
  BlobTooLarge            more bytes than were announced
  WrongOffset             an upload went on from another place than it had reached
  PartialBusy             another request is writing the same upload
  UnsafePath              a manifest names a path that is not plain and relative
"""

# ruff: noqa: N818 - an error is named after what went wrong


class StoreError(ValueError):
    """Base of everything that the store refuses."""


class BlobMissing(StoreError):
    """No blob has this digest."""


class DigestMismatch(StoreError):
    """The bytes are not the ones that were announced."""

    def __init__(self, expected: str, got: str):
        super().__init__(f"The blob must have the SHA-256 digest {expected}. Got {got}. Send it again.")
        self.expected, self.got = expected, got


class BlobTooLarge(StoreError):
    """More bytes than were announced."""

    def __init__(self, limit: int):
        super().__init__(f"The blob must have at most {limit} bytes, as announced. Got more.")
        self.limit = limit


class WrongOffset(StoreError):
    """An upload went on from another place than it had reached."""

    def __init__(self, expected: int, got: int):
        super().__init__(
            f"The upload must go on at offset {expected}. Got {got}. Send the rest from {expected}."
        )
        self.expected, self.got = expected, got


class PartialBusy(StoreError):
    """Another request is writing the same upload at this moment."""


class UnsafePath(StoreError):
    """A manifest names a path that is not plain and relative."""
