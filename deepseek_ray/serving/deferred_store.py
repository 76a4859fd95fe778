"""A state store whose writes wait until the prediction log has committed, and that remembers what it has read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from deepseek_ray.data.state import State, StateMemory, StateStore

CACHE_BYTES = 64 << 20
"""Of states kept in memory, the least recently used leave: this process alone writes, so they are what the store holds.
"""

_ENTRY_BYTES = 200  # key, entry and object headers

Stored = State | bytes
Write = tuple[str, Stored, int]


class _Cache:
    """Newest states by key, None for a key that the store lacks; the first to go was written, or read
    anew, the longest ago. Bounded in bytes when it is trimmed."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._bytes = max_bytes, 0
        self.states: OrderedDict[str, Stored | None] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def put(self, key: str, state: Stored | None) -> None:
        size = _size(state)
        self._bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.states[key] = state
        self.states.move_to_end(key)

    def trim(self) -> None:
        """Let the oldest go; not while a batch still counts on what it fetched."""
        while self._bytes > self.max_bytes:
            self._bytes -= self._sizes.pop(self.states.popitem(last=False)[0])


def _size(state: Stored | None) -> int:
    if state is None:
        return _ENTRY_BYTES
    return _ENTRY_BYTES + (state.num_bytes if isinstance(state, State) else len(state))


class DeferredStore(StateMemory):
    """Holds writes back in two steps: staged (may be undone), then kept (will be written).

    What is kept is in the cache too, and beside it until it is written: the cache may let it go.
    """

    def __init__(self, store: StateStore, cache_bytes: int = CACHE_BYTES) -> None:
        self._store = store
        self._cache = _Cache(cache_bytes)
        self._staged: dict[str, Write] = {}
        self._kept: dict[str, Write] = {}
        self.blind: set[str] = set()

    @property
    def num_kept(self) -> int:
        """States that wait to be written."""
        return len(self._kept)

    def fetch(self, keys: Iterable[str]) -> None:
        """Begin a batch: read what is not at hand in one round trip, so that ``read_states`` of these needs none."""
        self.blind = set()  # a batch with nothing fresh neither keeps nor discards
        self._cache.trim()
        self._fetch(self._missing(keys))

    def _fetch(self, missing: Sequence[str]) -> None:
        for key, blob in zip(missing, self._store.read_states(missing) if missing else (), strict=True):
            self._cache.put(key, blob)

    def do_without(self, keys: Iterable[str]) -> None:
        """Take what is not at hand for empty until the batch ends, and write nothing in its place."""
        self.blind = set(self._missing(keys))

    def _missing(self, keys: Iterable[str]) -> list[str]:
        states = self._cache.states
        absent = dict.fromkeys(key for key in keys if key not in states)
        return [key for key in absent if key not in self._kept and key not in self._staged]

    def read_states(self, keys: Sequence[str]) -> list[Stored | None]:
        """Newest states, written or not, in the order of the keys."""
        seen = [key for key in keys if key not in self.blind] if self.blind else keys
        if self._missing(seen):  # not within a batch, whose keys are at hand
            self._cache.trim()
            self._fetch(self._missing(seen))
        return [self._at_hand(key) for key in keys]

    def _at_hand(self, key: str) -> Stored | None:
        if key in self._staged:
            return self._staged[key][1]
        if key in self._cache.states:
            return self._cache.states[key]
        return self._kept[key][1] if key in self._kept else None  # a blind one

    def write_states(self, states: Iterable[Write]) -> None:
        """Stage states."""
        self._staged.update({state[0]: state for state in states if state[0] not in self.blind})

    def keep(self) -> None:
        """Make what is staged final."""
        for key, write in self._staged.items():
            self._kept[key] = write
            self._cache.put(key, write[1])
        self._staged, self.blind = {}, set()

    def discard(self) -> None:
        """Drop what is staged."""
        self._staged, self.blind = {}, set()

    def give_up(self) -> None:
        """Leave what is kept to the log; the cache still has it, as long as there is room."""
        self._kept = {}
        self._cache.trim()

    def forget(self, probe: str) -> None:
        """Make sure that the store answers, then hold nothing that it may lack."""
        self._store.read_states([probe])
        self.clear()

    def clear(self) -> None:
        """Hold nothing: what is replayed now must be read and written."""
        self._staged, self._kept, self.blind = {}, {}, set()
        self._cache = _Cache(self._cache.max_bytes)

    def flush(self) -> None:
        """Write what is kept; on an error it stays kept."""
        if self._kept:
            self._store.write_states([(key, _encoded(state), order) for key, state, order in self._kept.values()])
            self._kept = {}


def _encoded(state: Stored) -> bytes:
    return state.encode() if isinstance(state, State) else state
