"""The Feast objects of every vector in windows.yaml: where its history lies, what serves it, under which digest.

Each vector has one view (float64 arrays of features and of the card's recent events, joined on the card at the
event's own order) and one service. All vectors share the view of live states, which the stream engine reads and
writes. Feature names are declared in windows.yaml; their order is the order of the array.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Bytes, Float64, Int64, String

STATE_VIEW = "entity_state"
_TREE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("windows.yaml").read_text(encoding="utf-8"))

card = Entity(name="card", join_keys=["card_id"], value_type=ValueType.STRING, description="a payment card")
owner = Entity(
    name="state_owner",
    join_keys=["state_key"],
    value_type=ValueType.STRING,
    description="<service>/<card, terminal or device>/<id>",
)


def digest(body: dict[str, Any]) -> str:
    """sha256 of all that decides a vector's values; equals VectorSpec.digest."""
    text = json.dumps([_TREE["version"], _TREE["keys"], body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _source(name: str) -> FileSource:
    return FileSource(name=name, path=f"offline/{name}", timestamp_field="event_timestamp")


entity_state = FeatureView(
    name=STATE_VIEW,
    entities=[owner],
    schema=[Field(name="state", dtype=Bytes)],
    source=_source(STATE_VIEW),  # written online only; the transactions table is its history
    description="recent events and fraud labels of a card, terminal or device (data/state.py)",
)


def _vector_view(name: str, body: dict[str, Any]) -> FeatureView:
    fields = {"feature_values": Array(Float64), "sequence": Array(Float64), "order_us": Int64, "transaction_id": String}
    return FeatureView(
        name=f"{name}_vector",
        entities=[card],
        schema=[Field(name=field, dtype=dtype) for field, dtype in fields.items()],
        source=_source(body["service"]),
        online=False,  # a vector includes the event it is made for: it is computed in the request, never looked up
        tags={"digest": digest(body)},
    )


def _service(name: str, body: dict[str, Any], view: FeatureView) -> FeatureService:
    tags = {"vector": name, "digest": digest(body)}
    return FeatureService(name=body["service"], features=[view, entity_state], tags=tags)


VIEWS = {name: _vector_view(name, body) for name, body in _TREE["vectors"].items()}
SERVICES = {name: _service(name, body, VIEWS[name]) for name, body in _TREE["vectors"].items()}
globals().update({view.name: view for view in VIEWS.values()})  # `feast apply` collects module attributes
globals().update({service.name: service for service in SERVICES.values()})
