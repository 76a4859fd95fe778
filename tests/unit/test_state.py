"""What is remembered survives storing; a blob that is torn, foreign or of other windows does not pass."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from deepseek_ray.data.state import (
    CARD_COLUMNS,
    LABEL,
    ORDER,
    OTHER_COLUMNS,
    State,
    decode,
    empty,
)
from deepseek_ray.errors import FeatureError

HORIZON_US = 1_000


def remembered(columns: int = CARD_COLUMNS, num_events: int = 5) -> State:
    state = empty(columns, HORIZON_US)
    for number in range(1, num_events + 1):
        state = state.with_event([100 * number, *range(-1, columns - 2)], 100 * number - 1)
    return state.with_label(700, 33).with_label(600, -7)


def same(one: State, other: State) -> bool:
    names = ("rows", "columns", "last_order", "last_event_us", "horizon_us")
    return all(getattr(one, n) == getattr(other, n) for n in names) and np.array_equal(one.labels, other.labels)


@pytest.mark.parametrize("columns", [CARD_COLUMNS, OTHER_COLUMNS])
def test_a_state_is_read_as_it_was_written(columns: int) -> None:
    for state in (empty(columns, HORIZON_US), remembered(columns)):
        assert same(decode(state.encode(), "k", columns, HORIZON_US), state)


def test_events_leave_with_the_horizon_and_labels_too() -> None:
    state = remembered()
    assert state.events[ORDER].tolist() == [100, 200, 300, 400, 500]
    assert (state.last_order, state.last_event_us) == (500, 499)
    later = state.with_event([1_200, *[0] * 8], 1_200)
    assert later.events[ORDER].tolist() == [300, 400, 500, 1_200]
    assert later.labels.tolist() == [[600, 700], [-7, 33]]
    last = later.with_event([1_650, *[0] * 8], 1_650)
    assert last.events[ORDER].tolist() == [1_200, 1_650]
    assert last.labels.tolist() == [[700], [33]]
    assert state.events[ORDER].tolist() == [100, 200, 300, 400, 500], "a state does not change"


def test_orders_before_1970_are_numbers_as_others() -> None:
    state = empty(OTHER_COLUMNS, HORIZON_US)
    for order in (-5_000, -4_500, -3_900):
        state = state.with_event([order, 1, 2], order)
    assert state.events[ORDER].tolist() == [-4_500, -3_900]


def test_an_event_is_found_and_marked() -> None:
    state = remembered()
    assert [state.find(order) for order in (100, 500, 250, 900)] == [0, 4, -1, -1]
    marked = state.marked(3, 777)
    assert marked.events[LABEL].tolist() == [6, 6, 6, 777, 6]
    assert marked.events[:LABEL].tolist() == state.events[:LABEL].tolist()
    assert state.events[LABEL].tolist() == [6] * 5


def test_states_of_the_first_format_are_still_read() -> None:
    state = remembered()
    rest = struct.pack("<6q", CARD_COLUMNS, 5, 2, state.last_order, state.last_event_us, HORIZON_US)
    rest += np.ascontiguousarray(state.events).tobytes() + state.labels.tobytes()
    blob = struct.pack("<2q", 0x64726179_0001, zlib.crc32(rest)) + rest
    assert same(decode(blob, "k", CARD_COLUMNS, HORIZON_US), state)


@pytest.mark.parametrize("broken", ["torn", "flipped", "foreign", "short", "empty"])
def test_a_broken_blob_is_an_error(broken: str) -> None:
    blob = remembered().encode()
    parts = {
        "torn": blob[:-8],
        "flipped": blob[:100] + bytes([blob[100] ^ 1]) + blob[101:],
        "foreign": b"x" * len(blob),
        "short": blob[:20],
        "empty": b"",
    }
    with pytest.raises(FeatureError, match="'k' is corrupted"):
        decode(parts[broken], "k", CARD_COLUMNS, HORIZON_US)


def test_a_state_of_a_later_format_is_told_from_a_broken_one() -> None:
    blob = struct.pack("<q", 0x64726179_0003) + remembered().encode()[8:]
    with pytest.raises(FeatureError, match="'k' has format 3; this program reads 1 and 2"):
        decode(blob, "k", CARD_COLUMNS, HORIZON_US)


def test_a_state_of_other_windows_is_an_error() -> None:
    with pytest.raises(FeatureError, match="keeps 1000 us and 9 columns, not 2000 and 9"):
        decode(remembered().encode(), "k", CARD_COLUMNS, 2_000)
    with pytest.raises(FeatureError, match="not 1000 and 3"):
        decode(remembered().encode(), "k", OTHER_COLUMNS, HORIZON_US)
