"""Fraud patterns that may be scheduled on top of the published ones, as plain data.

A drift preset is a schedule of patterns. Days count from the day on which the drift begins
(``DataConfig.drift_start_day``). The published scenarios 1-3 stay alive beside every pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_ray.errors import ConfigError


@dataclass(frozen=True)
class FraudPattern:
    """One way to misuse cards. Ranges are inclusive low, exclusive high unless said otherwise.

    Attributes:
        name: what a report calls it.
        scenario: code in ``fraud_scenario``; 1-3 are the published scenarios.
        start_day: first day, counted from the beginning of the drift.
        num_days: length; None runs to the end of the data.
        cards_a_day: newly compromised cards a day and 1,000 customers.
        num_bursts: bursts a compromised card, at most one a day, on consecutive days.
        num_events: payments a burst.
        gap_s: seconds between two payments of a burst.
        start_hour: hour of the day in which a burst begins.
        amount_factor: amount over the card's mean amount, log-uniform.
        kind: kind of terminal used: "online" or "physical".
        categories: merchant categories used; empty means any.
        new_device_share: share of cards attacked from a device never seen with them; else their own is taken over.
        cards_a_device: cards attacked from the same new device.
        foreign_share: share of cards attacked from a country that is not the card's home (online only).
    """

    name: str
    scenario: int
    start_day: int = 0
    num_days: int | None = None
    cards_a_day: float = 4.0
    num_bursts: tuple[int, int] = (1, 2)
    num_events: tuple[int, int] = (3, 7)
    gap_s: tuple[float, float] = (30.0, 600.0)
    start_hour: tuple[float, float] = (0.0, 24.0)
    amount_factor: tuple[float, float] = (0.2, 1.2)
    kind: str = "online"
    categories: tuple[str, ...] = ()
    new_device_share: float = 0.0
    cards_a_device: int = 1
    foreign_share: float = 0.0


NEW_DEVICE = FraudPattern(
    name="new-device",
    scenario=4,
    cards_a_day=4.0,
    num_events=(3, 7),
    gap_s=(30.0, 600.0),
    amount_factor=(0.25, 1.5),
    categories=("digital", "gaming", "electronics", "travel"),
    new_device_share=0.9,
    cards_a_device=2,
    foreign_share=0.7,
)
"""Stolen card numbers tried in short bursts of small and medium online payments; doubles the number of frauds."""

TERMINAL_NIGHT = FraudPattern(
    name="terminal-night",
    scenario=5,
    cards_a_day=3.5,
    num_events=(4, 8),
    gap_s=(240.0, 1_500.0),
    start_hour=(0.0, 4.0),
    amount_factor=(0.7, 2.5),
    kind="physical",
)
"""A cloned card hops over terminals far from home at night."""

MERCHANT_SWITCH = FraudPattern(
    name="merchant-switch",
    scenario=6,
    cards_a_day=3.0,
    num_bursts=(3, 6),
    num_events=(1, 3),
    gap_s=(600.0, 7_200.0),
    start_hour=(8.0, 22.0),
    amount_factor=(0.8, 3.0),
    categories=("travel", "electronics"),
    new_device_share=0.15,
    foreign_share=0.1,
)
"""A taken-over account buys travel and electronics for some days, mostly from the owner's own device."""

DRIFT_PRESETS: dict[str, tuple[FraudPattern, ...]] = {
    "none": (),
    "new-device": (NEW_DEVICE,),
    "terminal-night": (TERMINAL_NIGHT,),
    "merchant-switch": (MERCHANT_SWITCH,),
}


def drift_preset(name: str) -> tuple[FraudPattern, ...]:
    """The schedule of a preset.

    Raises:
        ConfigError: no preset has this name.
    """
    if name not in DRIFT_PRESETS:
        raise ConfigError(
            f"Setting 'data.drift' = {name!r} is no drift preset.", fix=f"choose one of {', '.join(DRIFT_PRESETS)}"
        )
    return DRIFT_PRESETS[name]
