"""Who answers which card: a policy of arms and percentages, and the sticky split it stands for.

The champion answers whatever no arm takes. A card's place on the line from 0 to 100 is a keyed hash of its id, the same
in every process. The canary takes the line from its left end, the challenger from its right end: as a percentage grows,
cards join that arm and leave the champion, and none ever moves back or between arms.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek_ray.errors import ConfigError
from deepseek_ray.serving.wording import detail_of

DEFAULT_STEPS = (1.0, 5.0, 25.0, 100.0)
MAX_PAST = 8
"""Earlier steps that a policy remembers."""
_SPACE = float(1 << 64)
_SALT_BYTES = 16

Alias = Literal["canary", "challenger"]
Version = str


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Part):
    """A version that answers a share of the cards.

    The version is pinned: an alias that moves later (``challenger`` moves with each registration) takes no traffic
    until a person or a program sets it anew.
    """

    alias: Alias
    version: Version = Field(pattern=r"^[0-9]{1,9}$")
    percent: float = Field(gt=0, le=100, allow_inf_nan=False)


class Shadow(_Part):
    """A version that scores what the others answer; nobody ever sees its scores in an answer."""

    alias: Literal["shadow", "canary", "challenger"] = "shadow"
    version: Version = Field(pattern=r"^[0-9]{1,9}$")


class Schedule(_Part):
    """How the only arm grows: a step is left when it was healthy for long enough and on enough decisions."""

    steps: tuple[float, ...] = Field(DEFAULT_STEPS, min_length=1, max_length=20)
    dwell_s: float = Field(3_600.0, ge=0, allow_inf_nan=False, description="least time on a step")
    min_decisions: int = Field(1_000, ge=1, description="least decisions of the arm on a step")

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if list(self.steps) != sorted(set(self.steps)) or not 0 < self.steps[0] <= self.steps[-1] <= 100:
            raise ValueError("steps must rise, above 0 and up to 100 at most")
        return self


class Limits(_Part):
    """What an arm may do before its traffic goes back to the champion."""

    alpha: float = Field(0.01, gt=0, lt=1, description="chance of a false alarm of each test on a step, at any time")
    max_error_rate: float = Field(0.01, gt=0, lt=1, description="share of the arm's model calls that may fail")
    max_latency_ms: float = Field(20.0, gt=0, description="p99 of a model call; only with the ratio")
    max_latency_ratio: float = Field(2.0, ge=1, description="p99 of a model call, to the champion's")
    max_psi: float = Field(0.25, gt=0, description="population stability index of scores, arm against champion")
    min_scores: int = Field(500, ge=50, description="scores of each side before they are compared")


class Step(_Part):
    """What the split was from a moment on; labels of its decisions still come in."""

    since_us: int = Field(ge=0)
    arms: tuple[Arm, ...]

    def share(self, alias: str) -> float:
        """Share of an arm's cards in those of arm and champion together, 0-1."""
        percent = next((arm.percent for arm in self.arms if arm.alias == alias), 0.0)
        rest = 100.0 - sum(arm.percent for arm in self.arms)
        return percent / (percent + rest) if percent else 0.0


class Release(_Part):
    """A version on its way to champion by itself: shadow, then the arm of the schedule, then champion.

    Attributes:
        champion: version that the gate compared it with; beside another one the release ends.
        schedule: of the arm, which begins when the shadow was healthy for long enough.
    """

    version: Version = Field(pattern=r"^[0-9]{1,9}$")
    champion: Version = Field(pattern=r"^[0-9]{1,9}$")
    schedule: Schedule = Schedule()
    shadow_s: float = Field(3_600.0, ge=0, allow_inf_nan=False, description="least time as shadow; 0: no shadow")
    shadow_decisions: int = Field(1_000, ge=1, le=100_000, description="least decisions that the shadow scored")


class TrafficPolicy(_Part):
    """One rollout.

    Attributes:
        arms: at most one for each alias; the champion answers the rest.
        shadow: scores beside the others, or None.
        schedule: how the arm grows by itself; None: only on command.
        release: the version that arm or shadow are for, where it becomes champion by itself; see release.py.
        salt: key of the hash; another one draws other cards.
        past: the split's earlier steps, as long as arms only grew.
        revision: number of the move that made this policy, given by the registry.
        since_us: when it was made.
    """

    arms: tuple[Arm, ...] = ()
    shadow: Shadow | None = None
    schedule: Schedule | None = None
    release: Release | None = None
    limits: Limits = Limits()
    salt: str = Field(default_factory=lambda: secrets.token_hex(8), pattern=r"^[0-9a-f]{1,32}$")
    past: tuple[Step, ...] = ()
    revision: int = Field(0, ge=0)
    since_us: int = Field(default_factory=lambda: time.time_ns() // 1_000, ge=0)

    @model_validator(mode="after")
    def _check(self) -> TrafficPolicy:
        aliases = [arm.alias for arm in self.arms]
        if len(set(aliases)) != len(aliases):
            raise ValueError(f"an alias stands twice among the arms: {', '.join(aliases)}")
        if (total := sum(arm.percent for arm in self.arms)) > 100:
            raise ValueError(f"the arms take {total:g} % of the traffic, more than 100 %")
        if self.schedule is not None and len(self.arms) != 1:
            raise ValueError(f"a schedule needs exactly one arm, not {len(self.arms)}")
        if self.release is not None and not self.carries(self.release):
            raise ValueError(f"the release of version {self.release.version} needs it as shadow, or as the only arm")
        return self

    def carries(self, release: Release) -> bool:
        """Does a release go on here: is its version the only arm, on a schedule, or the shadow of no arm?"""
        if not self.arms:
            return self.shadow is not None and self.shadow.version == release.version
        return self.schedule is not None and self.arms[0].version == release.version

    @classmethod
    def parse(cls, text: str) -> TrafficPolicy:
        """Read a policy from JSON; "" is the policy without arms.

        Raises:
            ConfigError: it is no policy; the message names field and value.
        """
        if not text:
            return NO_TRAFFIC
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _wrong(error) from error

    @classmethod
    def make(cls, **fields: object) -> TrafficPolicy:
        """Build a policy; raises like :meth:`parse`."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _wrong(error) from error

    @property
    def champion_percent(self) -> float:
        """What is left for the champion."""
        return 100.0 - sum(arm.percent for arm in self.arms)

    @property
    def next_percent(self) -> float | None:
        """The schedule's next step, or None on the last one and without a schedule."""
        if self.schedule is None:
            return None
        return next((step for step in self.schedule.steps if step > self.arms[0].percent), None)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The past steps and the present one."""
        return (*self.past, Step(since_us=self.since_us, arms=self.arms))

    def grown(self, percent: float) -> TrafficPolicy:
        """The next policy: the one arm at a larger percentage."""
        arm = self.arms[0].model_copy(update={"percent": percent})
        kept = {"shadow": self.shadow, "schedule": self.schedule, "release": self.release, "limits": self.limits}
        return self.followed_by(TrafficPolicy.model_validate({"arms": (arm,), **kept}))

    def followed_by(self, after: TrafficPolicy) -> TrafficPolicy:
        """``after`` as the next revision: where arms only grow, they keep their cards and what is known of them."""
        known: dict[str, object] = {"revision": self.revision + 1}
        if _only_grows(self.arms, after.arms):
            known |= {"salt": self.salt, "past": self.steps[-MAX_PAST:]}
        return after.model_copy(update=known)

    def begun(self) -> TrafficPolicy:
        """The next policy: the released shadow becomes the arm, on the first step of its schedule."""
        assert self.release is not None
        schedule, version = self.release.schedule, self.release.version
        arm = Arm(alias="canary", version=version, percent=schedule.steps[0])
        return self.followed_by(TrafficPolicy(arms=(arm,), schedule=schedule, release=self.release, limits=self.limits))

    def ended(self) -> TrafficPolicy:
        """The next policy: the release's arm or shadow is gone, and the release with it."""
        after = self.without(self.arms[0].alias if self.arms else "")
        if after.shadow is not None and self.release is not None and after.shadow.version == self.release.version:
            return after.model_copy(update={"shadow": None})
        return after

    def without(self, alias: str) -> TrafficPolicy:
        """The next policy: an arm's cards back to the champion; the shadow goes on, schedule and release do not."""
        arms = tuple(arm for arm in self.arms if arm.alias != alias)
        rest = TrafficPolicy(arms=arms, shadow=self.shadow, limits=self.limits, salt=self.salt)
        return rest.model_copy(update={"revision": self.revision + 1})


NO_TRAFFIC = TrafficPolicy(salt="0", since_us=0)
"""The champion answers everyone."""


def _only_grows(before: Sequence[Arm], after: Sequence[Arm]) -> bool:
    earlier = {(arm.alias, arm.version): arm.percent for arm in before}
    return (
        bool(earlier)
        and earlier.keys() == {(arm.alias, arm.version) for arm in after}
        and all(arm.percent >= earlier[arm.alias, arm.version] for arm in after)
    )


class Split:
    """The line from 0 to 100, cut for the arms of a policy."""

    def __init__(self, arms: Sequence[Arm], salt: str) -> None:
        self._key = bytes.fromhex(salt.zfill(len(salt) + len(salt) % 2))[:_SALT_BYTES]
        self._left = next(((i, arm.percent) for i, arm in enumerate(arms) if arm.alias == "canary"), (-1, 0.0))
        self._right = next(((i, arm.percent) for i, arm in enumerate(arms) if arm.alias == "challenger"), (-1, 0.0))

    def place(self, entity: str) -> float:
        """An entity's place on the line, at least 0 and below 100."""
        digest = blake2b(entity.encode(), digest_size=8, key=self._key).digest()
        return 100.0 * (int.from_bytes(digest, "little") >> 11) / (_SPACE / 2048)

    def arm_of(self, entity: str) -> int:
        """Number of the arm that answers an entity, -1 for the champion."""
        place = self.place(entity)
        if place < self._left[1]:
            return self._left[0]
        return self._right[0] if place >= 100.0 - self._right[1] else -1


def _wrong(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    shown = f" = {first['input']!r}" if field else ""
    where = f"Traffic setting {field!r}{shown}" if field else "The traffic policy"
    return ConfigError(f"{where}: {detail_of(first)}.", fix="see deepseek-ray traffic set --help")
