"""Keep a run's champion up to date: ``python -m serve_apps.updater --run DIR --url http://127.0.0.1:8000``.

Looks at the log every ``updater.poll_s`` seconds and starts an update when a trigger says so. Each update is a
process of its own (``--once``), so that its memory is given back and its end, however it comes, is only its own. What
it does is in ``updater/state.json`` and ``updater/state.prom`` of the run folder; ``--show`` prints it and where a
release stands. Stops on SIGTERM or Ctrl-C; an update under way is ended too.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence

from deepseek_ray.child import run_python
from deepseek_ray.cli import add_settings, guarded, settings_arguments, settings_of
from deepseek_ray.config import Config
from deepseek_ray.online.triggers import EXIT_STATUS, Outcome
from deepseek_ray.paths import RunPaths, exclusive

_PASSED: dict[str, Outcome] = {"direct": "promoted", "canary": "released"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; with ``--once`` update now, exit status 3 when the gate refuses."""
    parser = argparse.ArgumentParser(prog="deepseek-ray updater", description="Update the champion when it is time.")
    add_settings(parser)
    parser.add_argument("--url", help="after a promotion wait until the service at this address answers with it")
    parser.add_argument("--once", action="store_true", help="update now, whatever the triggers say, and end")
    parser.add_argument("--show", action="store_true", help="print what it does and where a release stands, and end")
    parser.add_argument(
        "--release",
        choices=("direct", "canary"),
        help="how a version goes live that the gate passed; short for --set update.release=...",
    )
    options = parser.parse_args(arguments)
    if options.release:
        options.overrides.append(f"update.release={options.release}")
    config, paths = settings_of(options)
    if options.show:
        return _show(config, paths)
    return _once(config, paths, options.url) if options.once else _keep_on(config, paths, options)


def _show(config: Config, paths: RunPaths) -> int:
    from deepseek_ray.online.loop import read_state
    from deepseek_ray.registry import Registry
    from deepseek_ray.serving.release_desk import ReleaseDesk

    registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
    state = read_state(paths.updater / "state.json")
    print(f"updater  {'has not looked yet' if state is None else f'{state.status}: {state.message}'}")
    print("\n".join(ReleaseDesk(registry, config).lines(f" --run {paths.root}")))
    return 0


def _once(config: Config, paths: RunPaths, url: str | None) -> int:
    import torch

    from deepseek_ray.online.cycle import update
    from deepseek_ray.registry import Registry
    from deepseek_ray.serving.release_desk import ReleaseDesk

    torch.set_num_threads(1)  # the service needs the other core
    registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
    route = ReleaseDesk(registry, config, "the updater") if config.update.release == "canary" else None
    return EXIT_STATUS["refused" if update(config, paths, registry, url, route)["refusal"] else "promoted"]


def _keep_on(config: Config, paths: RunPaths, options: argparse.Namespace) -> int:
    from deepseek_ray.online.backlog import Backlog
    from deepseek_ray.online.loop import Loop
    from deepseek_ray.registry import Registry
    from deepseek_ray.serving.release_desk import ReleaseDesk

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    paths.updater.mkdir(parents=True, exist_ok=True)
    state = paths.updater / "state.json"
    with exclusive(paths.updater, f"Another updater of {str(paths.root)!r} is running.", "leave it or end it"):
        registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
        backlog, desk = Backlog(config, paths, registry), ReleaseDesk(registry, config)
        arguments, passed = _arguments(paths, options), _PASSED[config.update.release]
        loop = Loop(backlog, config.updater, lambda: _attempt(arguments, paths, stop, passed), state, time.time, desk)
        print(f"updating {config.model_name!r} of {paths.root}, see {state}", flush=True)
        while not stop.is_set():
            loop.look()
            stop.wait(config.updater.poll_s)
    return 0


def _arguments(paths: RunPaths, options: argparse.Namespace) -> list[str]:
    url = [f"--url={options.url}"] if options.url else []
    return ["-m", __spec__.name, "--once", f"--run={paths.root}", *url, *settings_arguments(options)]


def _attempt(
    arguments: Sequence[str], paths: RunPaths, stop: threading.Event, passed: Outcome = "promoted"
) -> tuple[Outcome, str] | None:
    """One update in a process of its own; its words go to a file beside the state. None when told to stop before.

    ``passed`` is what its version is by then where the gate agreed.
    """
    file = paths.updater / "update.log"
    with file.open("w", encoding="utf-8") as words:
        status = run_python(arguments, stop, words=words).status
    said = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
    outcomes: dict[int, Outcome] = {EXIT_STATUS["promoted"]: passed, EXIT_STATUS["refused"]: "refused"}
    outcome = outcomes.get(status, "failed")
    if outcome == "failed" and stop.is_set():
        return None
    return outcome, said[0] if outcome != "failed" else f"status {status}: {said[0]}"


if __name__ == "__main__":
    sys.exit(guarded(main))
