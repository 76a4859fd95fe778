"""Requests that schemathesis makes up from the service's description: no 5xx, no answer that it does not name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.serving_parts import KEY, Rig, rig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
EXAMPLES = 150


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("fuzz"), max_queued=1_000) as one:
        yield one


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/risk/score", "POST"),
        ("/v1/risk/feedback", "POST"),
        ("/v1/risk/threshold", "POST"),
        ("/v1/risk/model", "GET"),
        ("/healthz", "GET"),
        ("/readyz", "GET"),
        ("/metrics", "GET"),
    ],
)
def test_no_made_up_request_breaks_the_service(made: Rig, path: str, method: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as conformance

    app = made.make_app(made.service(shutdown=lambda: None))  # each call starts and stops it
    described = schemathesis.openapi.from_asgi("/openapi.json", app=app, headers={"X-API-Key": KEY})
    kept = [
        checks.not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]

    seen: set[int] = set()

    def call(case: schemathesis.Case) -> None:
        seen.add(case.call_and_validate(headers={"X-API-Key": KEY}, checks=kept).status_code)

    # bodies that fit the description, and such that miss it somewhere
    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    strategy = described[path][method].as_strategy(generation_mode=positive)
    if method == "POST":
        strategy |= described[path][method].as_strategy(generation_mode=negative)
    bounds = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    bounds(given(case=strategy)(call))()
    assert seen >= ({200} if method == "GET" else {422}), f"only {seen} was reached"
    assert 429 not in seen, "the queue was closed or full: nothing was tested"


def test_the_routes_of_the_description_are_all_fuzzed() -> None:
    from deepseek_ray.serving import openapi

    marks = test_no_made_up_request_breaks_the_service.pytestmark
    fuzzed = {path for mark in marks if mark.name == "parametrize" for path, _ in mark.args[1]}
    assert fuzzed == set(openapi.document()["paths"])
