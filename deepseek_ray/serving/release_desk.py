"""Where updates ask about releases: may one begin, begin it, where does it stand, when did the last one begin."""

from __future__ import annotations

from datetime import datetime

from deepseek_ray.config import Config
from deepseek_ray.data.evidence import GateDecision
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.registry import Registry, TrafficBook, Words
from deepseek_ray.serving.release import stands, start, taken
from deepseek_ray.serving.traffic import TrafficPolicy

BEGUN = "release"
"""Action of the move that begins a release."""


class ReleaseDesk:
    """Releases of one model, by way of shadow and canary; a ``Route`` of online/cycle.py.

    Args:
        registry: of the model.
        config: its section ``release``, and ``update.release``.
        who: for the history.
    """

    champion_at_once = False

    def __init__(self, registry: Registry, config: Config, who: str = "an update") -> None:
        self._registry, self._book = registry, TrafficBook(registry)
        self._settings, self._who = config.release, who
        self._by_canary = config.update.release == "canary"

    def standing(self) -> str:
        """Where the release stands that is under way, "" without one.

        Raises:
            RegistryUnavailableError: the store does not answer.
            ConfigError: the registry holds no readable policy.
        """
        return stands(self._policy())

    def blocked(self) -> str:
        """Why no update should begin now: its version would disturb a release, or could not begin its own."""
        policy = self._policy()
        return taken(policy) if self._by_canary or policy.release is not None else ""

    def begun_s(self) -> float:
        """When the newest release began, seconds since 1970; 0 without one."""
        begun = [move.at for move in self._book.moves() if move.action == BEGUN]
        return datetime.fromisoformat(begun[-1]).timestamp() if begun else 0.0

    def lines(self, run: str = "") -> list[str]:
        """Where a release stands, or how the last one went, and the commands that come next.

        Args:
            run: what the commands need to find the run, as in " --run runs/mine".
        """
        policy = self._policy()
        if policy.release is None:
            newest = next(reversed(self._book.moves()), None)
            last = f"the traffic's last move: {newest.at} {newest.summary}: {newest.why}" if newest else "none so far"
            return [f"release  none is under way; {last}"]
        lines = [
            f"release  {stands(policy)}; a running service moves it on",
            f"next     deepseek-ray traffic show{run}        what speaks for and against it",
            f"         deepseek-ray traffic rollback{run}    take it back: its labels wait again",
        ]
        if policy.arms:
            lines.append(f"         deepseek-ray traffic promote{run}     do not wait for the other steps")
        return lines

    def ready(self) -> None:
        """Ask before the work.

        Raises:
            EnvironmentProblemError: no release may begin now.
        """
        self._free(self._book.read())

    def offer(self, version: str, decision: GateDecision) -> str:
        """Begin the release of a version if the gate agrees; why not, or "".

        Raises:
            EnvironmentProblemError: another one began meanwhile.
            RegistryError: the traffic was moved in this very moment.
            ModelFormatError: the version does not load.
        """
        text = self._book.read()
        before, champion = self._free(text), decision.champion_version or ""
        after = start(before, version, champion, self._settings)
        where = stands(after).partition(" since")[0]
        words = Words(BEGUN, self._who, "the gate agreed", f"champion 100 % -> {where}")
        return self._book.admit(text, after.model_dump_json(), version, decision, words)

    def _free(self, text: str) -> TrafficPolicy:
        policy = TrafficPolicy.parse(text)
        if reason := taken(policy):
            raise EnvironmentProblemError(
                f"No release of {self._registry.name!r} can begin: {reason}.",
                fix="wait for its end, or end it: deepseek-ray traffic show, then traffic rollback or set --shadow off",
            )
        return policy

    def _policy(self) -> TrafficPolicy:
        return TrafficPolicy.parse(self._book.read())
