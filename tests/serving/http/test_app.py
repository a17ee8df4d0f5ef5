"""HTTP API: responses, errors, authentication, metrics and log."""

import asyncio
import copy
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.serving.http import schema
from a2gen_rec.serving.http.app import _RankFastPath, create_app
from a2gen_rec.serving.http.guard import RequestGuard
from tests.helpers.fake_ranker import ITEMS, expected_order
from tests.helpers.properties import examples
from tests.helpers.service import RunningService, running, wait_until

KEYS = ["first-key-of-the-service", "second-key-of-the-service"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("app")) as service:
        yield service


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("locked"), KEYS) as service:
        yield service


def history_items(response: Any) -> list[str]:
    """Return the items of the history that a ranking used, in order."""
    return [step["action"] for step in response.json()["candidates"][0]["timeline"]]


def test_candidates_are_sorted(one: RunningService) -> None:
    @examples(25)
    @given(
        st.text('ab/%"ü\0 ', min_size=1, max_size=9), st.lists(st.sampled_from(ITEMS), min_size=1), st.integers(1, 50)
    )
    def ranks(user: str, candidates: list[str], k: int) -> None:
        response = one.rank(user, candidates=candidates, k=k)
        assert response.status_code == 200, response.text
        body = response.json()
        assert [candidate["item"] for candidate in body["candidates"]] == expected_order(user, candidates, k)
        assert (body["user"], body["num_candidates"], body["model_version"]) == (user, len(set(candidates)), "one")
        schema.RankResponse.model_validate(body)

    ranks()


def test_missing_scores_are_null(one: RunningService) -> None:
    (best,) = one.rank(k=1).json()["candidates"]
    assert best["timeline_probability"] is None
    assert best["score"] is None


def test_events_count_in_the_next_ranking(one: RunningService) -> None:
    user = "reader/of own%20writes ü"
    for number in range(5):
        posted = one.post(user, {"item": f"v{number}", "ts_ms": 1000 * number})
        assert (posted.status_code, posted.json()) == (200, {"recorded": 1})
        assert history_items(one.rank(user)) == [f"v{index}" for index in range(number + 1)]
    late = {
        "item": "late",
        "ts_ms": 500,
        "watch_s": 3,
        "actions": [{"name": "like", "at_s": 1.5}],
        "features": {"tab": "a"},
        "labels": {},
    }
    for _ in range(2):  # a retry has no effect
        one.post(user, late)
        assert history_items(one.rank(user)) == ["v0", "late", "v1", "v2", "v3", "v4"]
    assert one.rank(user).json()["fallbacks"] == []
    response = one.client.get("/v1/users/reader%2Fof%20own%2520writes%20%C3%BC/history", params={"last": 5}).json()
    assert [impression["item"] for impression in response["impressions"]] == ["late", "v1", "v2", "v3", "v4"], (
        "the latest five"
    )
    assert response["user"] == user
    assert response["durations_s"] == {"v1": 1.0, "v2": 2.0, "v3": 3.0, "v4": 4.0}, "for videos known to the model"
    assert user in one.client.get("/v1/users", params={"count": 100}).json()["users"]
    assert response["impressions"][0] == {**late, "watch_s": 3.0}
    again = one.rank(user, history=response["impressions"])
    assert history_items(again) == ["late", "v1", "v2", "v3", "v4"], (
        "a history in the request replaces the recorded one"
    )
    assert one.rank(user, history=[]).json()["fallbacks"] == ["empty_history"]


def test_default_query_time_is_now(one: RunningService) -> None:
    def query_time(user: str, **body: Any) -> int | None:
        assert one.rank(user, **body).status_code == 200
        value: int | None = one.ranker.query_times[-1]
        return value

    for user in ("last seen long ago", "never seen"):
        if user != "never seen":
            one.post(user, {"item": "v1", "ts_ms": 10**12, "watch_s": 5})
        before = int(time.time() * 1000)
        assert before <= (query_time(user) or 0) <= time.time() * 1000
        assert query_time(user, now_ms=7) == 7
        assert query_time(user, history=[{"item": "v1", "ts_ms": 10**12}]) is None, (
            "derived from the history in the request"
        )
    ahead = int(time.time() * 1000) + 3_600_000
    one.post("of another clock", {"item": "v1", "ts_ms": ahead})
    assert query_time("of another clock") == ahead, "it counts in the next ranking"


def test_deleted_user_has_no_history(one: RunningService) -> None:
    user = "to be/forgotten"
    path = "/v1/users/to%20be%2Fforgotten/history"
    for number in range(3):
        one.post(user, {"item": f"v{number}", "ts_ms": number})
    assert history_items(one.rank(user)) == ["v0", "v1", "v2"]
    response = one.client.delete(path)
    assert (response.status_code, response.json()) == (200, {"num_deleted": 3, "overwritten": True})
    assert user not in one.service._model.backend.history_cache._entries
    assert one.client.get(path).json()["impressions"] == []
    assert user not in one.client.get("/v1/users", params={"count": 100}).json()["users"]
    assert one.rank(user).json()["fallbacks"] == ["empty_history"]
    for number in range(5, 8):
        one.post(user, {"item": f"v{number}", "ts_ms": number})
    assert history_items(one.rank(user)) == ["v5", "v6", "v7"]
    assert one.client.delete(path).json() == {"num_deleted": 3, "overwritten": True}
    assert one.client.delete(path).json() == {"num_deleted": 0, "overwritten": True}


def test_numeric_categories_keep_their_type(one: RunningService) -> None:
    features = {"tab": 1, "speed": 1.0, "place": -(10**15), "city": "1"}
    one.post("counts", {"item": "v1", "ts_ms": 1, "features": features})
    (impression,) = one.client.get("/v1/users/counts/history").json()["impressions"]
    assert repr(impression["features"]) == repr(features)


def test_events_are_recorded_atomically(one: RunningService) -> None:
    wrong = {"item": "v2", "ts_ms": 2, "actions": [{"name": "fly"}]}
    response = one.post("half", {"item": "v1", "ts_ms": 1}, wrong)
    assert response.status_code == 422
    assert "unknown action 'fly'" in response.json()["error"]["message"]
    assert one.client.get("/v1/users/half/history").json()["impressions"] == []


IMPRESSION = {"item": "v", "ts_ms": 1}
LATEST = schema.MAX_TIMESTAMP_MS
INVALID: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/rank", {"candidates": []}, "body.candidates: List should have at least 1 item"),
    ("/v1/rank", {"candidates": ["v"] * 2001}, "body.candidates: List should have at most 2000 items"),
    ("/v1/rank", {"candidates": [1] * 2000}, "body.candidates.0: Input should be a valid string"),
    ("/v1/rank", {"candidates": [""]}, "body.candidates.0"),
    ("/v1/rank", {"candidates": ["v" * 257]}, "at most 256 characters"),
    ("/v1/rank", {"user": 7}, "body.user: Input should be a valid string"),
    ("/v1/rank", {"k": 0}, "body.k"),
    ("/v1/rank", {"k": 1.5}, "body.k"),
    ("/v1/rank", {"k": True}, "body.k"),
    ("/v1/rank", {"k": "3"}, "body.k"),
    ("/v1/rank", {"explain": 1}, "body.explain"),
    ("/v1/rank", {"timeout_ms": 10**6}, "body.timeout_ms"),
    ("/v1/rank", {"other": 1}, "body.other: Extra inputs are not permitted"),
    ("/v1/rank", {f"x{number}": 1 for number in range(99)}, "at most 64 fields"),
    ("/v1/rank", {"context": {f"x{number}": 1 for number in range(65)}}, "at most 64 fields"),
    ("/v1/rank", {"context": {"tab": True}}, "body.context.tab"),
    ("/v1/rank", {"context": {"tab": 10**400}}, "body.context.tab"),
    ("/v1/rank", {"user_features": {"group": "a"}}, "unknown user feature 'group'"),
    ("/v1/rank", {"history": [IMPRESSION] * 1001}, "body.history"),
    ("/v1/rank", {"history": [IMPRESSION | {"actions": [{"name": "fly"}]}]}, "unknown action 'fly'"),
    ("/v1/rank", {"now_ms": 2**63}, "body.now_ms"),
    ("/v1/events", {"impressions": []}, "body.impressions"),
    ("/v1/events", {"impressions": [IMPRESSION | {"ts_ms": -1}]}, "body.impressions.0.ts_ms"),
    ("/v1/events", {"impressions": [IMPRESSION | {"watch_s": -1}]}, "body.impressions.0.watch_s"),
    ("/v1/events", {"impressions": [IMPRESSION | {"watch_s": 1e300}]}, "body.impressions.0.watch_s"),
    ("/v1/events", {"impressions": [IMPRESSION | {"ts_ms": LATEST}]}, "more than one day in the future"),
    ("/v1/events", {"impressions": IMPRESSION}, "body.impressions: Input should be a valid list"),
]


@pytest.mark.parametrize(("path", "fields", "why"), INVALID)
def test_rejects_invalid_fields_by_name(one: RunningService, path: str, fields: dict[str, Any], why: str) -> None:
    body = {"user": "u"} | ({"candidates": ["v"]} if path == "/v1/rank" else {"impressions": [IMPRESSION]}) | fields
    response = one.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    error = schema.ErrorResponse.model_validate(response.json()).error
    assert error.code == "invalid_request"
    assert why in error.message
    assert len(error.message) < 600
    assert error.request_id == response.headers["x-request-id"]


def test_failed_request_affects_no_other(one: RunningService) -> None:
    response = one.rank(candidates=["bad"])
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert one.rank().status_code == 200


def test_log_contains_no_user_or_item(one: RunningService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    user, item = "secret-user", "secret-item"
    statuses = [
        one.rank(user, candidates=[item]),
        one.rank(user, candidates=[item, "bad"]),
        one.rank(user, candidates=[item, "slow"], timeout_ms=1),
        one.rank(user, user_features={item: item}),
        one.rank(user, secret=item),
        one.post(user, {"item": item, "ts_ms": 1}),
        one.post(user, {"item": item, "ts_ms": 1, "actions": [{"name": item}]}),
        one.client.get(f"/v1/users/{user}/history", params={"last": item}),
        one.client.get(f"/v1/users/{user}/history"),
        one.client.get(f"/{user}"),
        one.client.post("/v1/rank", content=f'{{"user": "{user}"', headers={"Content-Type": "application/json"}),
    ]
    assert [response.status_code for response in statuses] == [200, 500, 504, 422, 422, 200, 422, 422, 200, 404, 400]

    def logged() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith(("a2gen_rec", "uvicorn"))]

    def lines() -> list[str]:
        """Lines of these requests; those of an earlier test may be written after its responses too."""
        ids = [response.headers["x-request-id"] for response in statuses]
        requests = [line for line in logged() if line.startswith(("GET", "POST"))]
        return [line for request_id in ids for line in requests if request_id in line]

    wait_until(lambda: len(lines()) >= len(statuses))  # after the response
    messages = logged()
    assert len(lines()) == len(statuses)
    assert any(line.startswith("GET /v1/users/{user:path}/history 200 ") for line in lines())
    assert any("KeyError" in line for line in messages), "the failure itself is logged"
    assert not [line for line in messages if "secret" in line]


def test_valid_request_ids_are_kept(one: RunningService) -> None:
    def request_id(value: str) -> str:
        return one.client.get("/healthz", headers={"X-Request-Id": value}).headers["x-request-id"]

    assert request_id("Trace-1.2_3") == "Trace-1.2_3"
    assert request_id("a" * 65) != "a" * 65
    assert request_id("two words") != "two words"


def test_responses_have_security_headers(one: RunningService) -> None:
    responses = [one.rank(), one.rank(k=0), one.client.get("/nothing"), one.rank(candidates=["bad"])]
    for response in responses:
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in response.headers


def test_without_keys_rejects_other_hosts_and_origins(one: RunningService) -> None:
    def status(**headers: str) -> int:
        return one.client.post("/v1/model/reload", headers=headers).status_code

    host = f"127.0.0.1:{one.address[1]}"
    assert status() == 200
    assert status(Host="localhost") == 200
    assert status(Host="[::1]:99") == 200
    assert status(Host="127.0.0.2") == 200
    assert status(Host="127.0.0.1.attacker.example") == status(Host="10.0.0.1") == status(Host="") == 421
    assert status(Host="attacker.example") == 421
    assert status(Host="[") == 421
    assert status(Origin=f"http://{host}") == 200
    assert status(Origin="http://attacker.example") == 403
    assert status(Origin="null") == 403
    form = one.client.post("/v1/events", content='{"user": "u"}', headers={"Content-Type": "text/plain"})
    assert form.status_code == 415


def test_with_keys_requires_a_valid_one(locked: RunningService) -> None:
    def status(path: str, **headers: str | bytes) -> int:
        return locked.client.get(path, headers={"Authorization": "", **headers}).status_code

    for path in ("/v1/model", "/metrics", "/v1/users/u/history", "/v1/nothing"):
        assert status(path) == 401
    assert status("/v1/model", Authorization=f"Bearer {KEYS[0]}") == 200
    assert status("/v1/model", Authorization=f"bearer {KEYS[1]}") == 200
    assert status("/v1/model", **{"X-Api-Key": KEYS[1]}) == 200
    assert status("/metrics", **{"X-Api-Key": KEYS[1]}) == 200
    assert status("/v1/model", Authorization=f"Basic {KEYS[0]}") == 401
    assert status("/v1/model", Authorization=f"Bearer {KEYS[0][:-1]}") == 401
    assert status("/v1/model", **{"X-Api-Key": "é".encode("latin-1")}) == 401
    assert status("/healthz") == status("/readyz") == status("/openapi.json") == 200
    assert status("/v1/model", Authorization=f"Bearer {KEYS[0]}", Host="ranker.example") == 200
    body = {"user": "u", "candidates": ["v"]}
    for path in ("/v1/rank", "/v1/events", "/v1/model/reload"):
        assert locked.client.post(path, json=body, headers={"Authorization": ""}).status_code == 401
    assert locked.rank().status_code == 200


def test_model_info(one: RunningService) -> None:
    response = schema.ModelResponse.model_validate(one.client.get("/v1/model").json())
    assert (response.version, response.dataset, response.actions[0], response.actions[-1]) == (
        "one",
        "random",
        "start",
        "exit",
    )
    assert {feature.level for feature in response.features} <= {"user", "item", "context"}
    assert (response.sample_users, response.sample_items) == (["u1", "u2"], ITEMS)
    assert (response.sort_keys, response.session_gap_s) == (["like"], 25.0)
    assert response.limits["candidates"] == 2000


def test_prometheus_metrics(one: RunningService) -> None:
    def metrics() -> dict[str, float]:
        lines = one.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = metrics()
    one.rank("figures")
    one.rank("figures", k=0)
    one.post("figures", IMPRESSION, IMPRESSION | {"ts_ms": 2})
    after = metrics()

    def increase(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert increase('a2gen_request_seconds_count{route="/v1/rank",status="200"}') == 1
    assert increase('a2gen_errors_total{code="invalid_request"}') == 1
    assert increase("a2gen_impressions_total") == 2
    assert increase('a2gen_degraded_rankings_total{kind="empty_history"}') == 1
    assert increase("a2gen_batch_candidates_sum") == 5
    assert increase("a2gen_queue_seconds_count") == 1
    assert after["a2gen_queue_candidates"] == 0
    assert after['a2gen_model{version="one"}'] == 1
    assert not [name for name in after if "figures" in name]


def test_openapi_examples_are_valid_requests(one: RunningService, locked: RunningService) -> None:
    openapi = one.client.get("/openapi.json").json()
    for path, name in (("/v1/rank", "RankRequest"), ("/v1/events", "EventsRequest")):
        (example,) = openapi["components"]["schemas"][name]["examples"]
        assert one.client.post(path, json=example).status_code == 200
    assert "security" not in openapi["paths"]["/v1/rank"]["post"]
    assert "security" in locked.client.get("/openapi.json").json()["paths"]["/v1/rank"]["post"]


def test_serves_the_page_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<p>page")
    monkeypatch.setattr("a2gen_rec.serving.http.app.WEB", tmp_path)
    with running(tmp_path, KEYS) as service:
        response = service.client.get("/", headers={"Authorization": ""})
        assert (response.status_code, response.text) == (200, "<p>page"), "the page itself asks for the key"
        assert service.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert service.client.get("/..%2f..%2fetc/passwd").status_code == 404
        assert service.rank().status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"user": "u1", "candidates": ["v1", "v2", "v3"], "k": 2}',
        b'{"user": "u1", "candidates": ["v1"], "history": [{"item": "v2", "ts_ms": 5}], "now_ms": 9}',
        b"",
        b"null",
        b"[]",
        b'{"user": "u1"}',
        b'{"user": "u1", "candidates": [], "k": 0, "no such": 1, "sort_by": 3}',
        b'{"user": "u1", "candidates": ["v1"], "context": {"no such": 1}}',
        b'{"user": NaN}',
        b'{"user": "\xff"}',
        b'{"user": "u1", "candidates": ["bad"]}',
    ],
)
def test_fast_path_matches_the_documented_route(one: RunningService, body: bytes) -> None:
    fast = create_app(one.service)
    assert isinstance(fast.app, _RankFastPath)
    routed = copy.copy(fast)
    routed.app = fast.app.app

    async def post(app: RequestGuard) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            kind = {"Content-Type": "application/json", "X-Request-Id": "same"}
            return await client.post("/v1/rank", content=body, headers=kind)

    actual, expected = (asyncio.run(post(app)) for app in (fast, routed))
    assert (actual.status_code, actual.json()) == (expected.status_code, expected.json())
    assert actual.headers.items() == expected.headers.items()
