"""Processes of one machine that form a process group: for tests, and for ``verify mesh`` without a cluster.

They are forked from a process that has torch imported, so eight of them start in a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore

from deepseek_ray.errors import DeepseekRayError, EnvironmentProblemError


def run_processes(
    world_size: int, work: Callable[..., Any], *arguments: Any, backend: str = "gloo", timeout_s: float = 120.0
) -> list[Any]:
    """Call ``work(*arguments)`` in every process of a new group; returns what each returned, by rank.

    Args:
        world_size: processes.
        work: must leave no threads behind; its results travel through a pipe.
        arguments: of every call.
        backend: of torch.distributed.
        timeout_s: of one collective.

    Raises:
        DeepseekRayError: what a process raised on purpose.
        EnvironmentProblemError: a process raised something else or died; carries the first one's traceback.
    """
    if backend != "gloo":
        raise EnvironmentProblemError(f"Backend {backend!r} needs one process a device.", fix="run it on a cluster")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        children, pipes = [], []
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(rank, world_size, store, timeout_s, there, work, arguments), daemon=True
            )
            child.start()
            there.close()
            children.append(child)
            pipes.append(here)
        try:
            return _results(pipes)
        finally:
            for child in children:
                child.join(timeout=1.0)
                if child.is_alive():
                    child.kill()
                    child.join()


def _results(pipes: list[Connection]) -> list[Any]:
    """Wait for all; the first failure ends the wait, because the others may hang in a collective."""
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        for ready in wait(list(waiting)):
            assert isinstance(ready, Connection)
            rank = waiting.pop(ready)
            try:
                done, value = ready.recv()
            except EOFError:
                raise EnvironmentProblemError(f"Process {rank} of {len(pipes)} died.", fix="see its output") from None
            if isinstance(value, DeepseekRayError):
                raise value
            if not done:
                raise EnvironmentProblemError(f"Process {rank} of {len(pipes)} failed:\n{value}", fix="see above")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _child(
    rank: int, world_size: int, store: str, timeout_s: float, pipe: Connection, work: Any, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    try:
        dist.init_process_group(
            "gloo", store=FileStore(store, world_size), rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        _send(pipe, True, work(*arguments))
        dist.barrier()  # nobody leaves while others still need its connections
    except DeepseekRayError as error:
        _send(pipe, False, error)
    except BaseException:
        _send(pipe, False, traceback.format_exc())
    finally:
        pipe.close()
        os._exit(0)  # inherited state must not be torn down twice


def _send(pipe: Connection, done: bool, value: Any) -> None:
    pipe.send_bytes(pickle.dumps((done, value)))  # by value: Connection.send would share tensors that end with us
