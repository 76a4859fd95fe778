"""An answer's head waits for its body and for nothing else."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from deepseek_ray.serving.joined_writes import JoinedWrites

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Seen:
    """A transport that notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")

    def is_closing(self) -> bool:
        return "close" in self.calls


def made() -> tuple[JoinedWrites, Seen]:
    seen = Seen()
    return JoinedWrites(cast(asyncio.Transport, seen)), seen


def test_head_and_body_are_one_write_and_answers_stay_apart() -> None:
    joined, seen = made()
    for body in (b"{}", b"[]"):
        joined.write(HEAD)
        joined.write(body)
    assert seen.calls == [HEAD + b"{}", HEAD + b"[]"]


def test_parts_of_a_long_body_pass() -> None:
    joined, seen = made()
    for part in (HEAD, b"one\r\n\r\n", b"two"):
        joined.write(part)
    assert seen.calls == [HEAD + b"one\r\n\r\n", b"two"]


def test_what_has_no_body_to_wait_for_passes() -> None:
    joined, seen = made()
    joined.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    joined.write(HEAD + b"{}")
    joined.write(HEAD)
    joined.write(b"")  # of HEAD and 204
    assert seen.calls == [b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"{}", HEAD]


def test_closing_writes_what_was_kept_and_aborting_does_not() -> None:
    joined, seen = made()
    joined.write(HEAD)
    joined.close()
    assert (seen.calls, joined.is_closing()) == ([HEAD, "close"], True)
    joined, seen = made()
    joined.write(HEAD)
    joined.abort()
    assert seen.calls == ["abort"]
