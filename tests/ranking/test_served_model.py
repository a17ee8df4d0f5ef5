"""An exported model behind the service: HTTP responses match the ranker."""

from pathlib import Path
from typing import Any

import pytest
from pydantic_core import from_json, to_json

from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import RankedList, RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.serving.http import schema
from a2gen_rec.serving.http.serialization import rank_response
from tests.helpers.logs import hashed_log
from tests.helpers.service import RunningService, running

pytestmark = pytest.mark.training


def test_service_matches_the_ranker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today = 10**12 + 10**11
    monkeypatch.setattr("a2gen_rec.serving.engine.inference.now_ms", lambda: today)
    log = hashed_log(tmp_path)
    export_run(log.run, str(tmp_path / "export"), "fp32")
    ranker = Ranker.load(str(tmp_path / "export"))
    items = ranker.sample_items(30)
    with running(tmp_path, model=tmp_path / "export", load=Ranker.load) as service:
        for user, impressions in sorted(log.impressions.items())[:4]:
            # One by one, then the rest at once and late.
            for batch in [impressions[-1:], impressions[:3], *([one] for one in impressions[3:6]), impressions[6:-1]]:
                bodies = [schema.ImpressionSchema.from_impression(impression).model_dump() for impression in batch]
                assert not bodies or service.post(user, *bodies).status_code == 200
                context = {name: impressions[-1].features[name] for name in ("tab", "speed", "network")}
                response = service.rank(user, candidates=items, context=context)
                assert response.status_code == 200, response.text
            history = ranker.encode(impressions)
            assert_matches(response.json(), ranker.rank(RankQuery(user, items, today, history, context=context)))
            # At an earlier query time, with more later impressions than a service caches.
            now = impressions[4].ts_ms
            assert len(impressions) > 4 + ranker.max_history
            then = RankQuery(user, items, now, [impression for impression in impressions if impression.ts_ms <= now])
            assert_matches(service.rank(user, candidates=items, now_ms=now).json(), ranker.rank(then))
        assert service.client.get("/v1/model").json()["version"] == ranker.version
        check_times_in_other_units(service, items)


def check_times_in_other_units(service: RunningService, items: list[str]) -> None:
    user, now_s = "careless", 1_714_521_600
    past = [{"item": items[0], "ts_ms": 1000 * now_s}]
    assert service.post(user, *past).status_code == 200
    for wrong in (now_s, now_s * 10**6, 0, 946_684_799_999):
        impression = {"item": items[0], "ts_ms": wrong}
        for response, field in (
            (service.post(user, *past, impression), "ts_ms"),
            (service.rank(user, candidates=items, history=[impression]), "ts_ms"),
            (service.rank(user, candidates=items, now_ms=wrong), "now_ms"),
            (service.rank(user, candidates=items, now_ms=wrong, history=past), "now_ms"),
        ):
            assert response.status_code == 422
            assert field in response.json()["error"]["message"]
    history = service.client.get(f"/v1/users/{user}/history").json()["impressions"]
    assert [impression["ts_ms"] for impression in history] == [1000 * now_s]


def assert_matches(body: dict[str, Any], expected: RankedList) -> None:
    reference = from_json(to_json(rank_response(expected, list(expected.fallbacks))))
    assert without_predictions(body) == without_predictions(reference)
    assert probabilities(body) == pytest.approx(probabilities(reference), abs=1e-5)


def without_predictions(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "candidates": [(candidate["item"], candidate["known"]) for candidate in body["candidates"]]}


def probabilities(body: dict[str, Any]) -> list[float]:
    return [chance for candidate in body["candidates"] for _, chance in sorted(candidate["probability"].items())]
