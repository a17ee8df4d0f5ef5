"""A real exported model behind the service: over HTTP comes what the ranker itself says."""

from pathlib import Path
from typing import Any

import pytest
from pydantic_core import from_json, to_json

from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import RankedList, RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.serving.http import schema
from tests.helpers.logs import hashed_log
from tests.helpers.service import running


def test_the_service_answers_what_the_ranker_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today = 10**12 + 10**11
    monkeypatch.setattr("a2gen_rec.serving.engine.inference.now_ms", lambda: today)
    log = hashed_log(tmp_path)
    export_run(log.run, str(tmp_path / "export"), "fp32")
    ranker = Ranker.load(str(tmp_path / "export"))
    items = ranker.sample_items(30)
    with running(tmp_path, model=tmp_path / "export", load=Ranker.load) as service:
        for user, impressions in sorted(log.impressions.items())[:4]:
            # One by one, then what is left at once and late.
            for each in [impressions[-1:], impressions[:3], *([one] for one in impressions[3:6]), impressions[6:-1]]:
                told = [schema.ImpressionSchema.from_impression(one).model_dump() for one in each]
                assert not told or service.post(user, *told).status_code == 200
                context = {name: impressions[-1].features[name] for name in ("tab", "speed", "network")}
                found = service.rank(user, candidates=items, context=context)
                assert found.status_code == 200, found.text
            history = ranker.encode(impressions)
            as_told(found.json(), ranker.rank(RankQuery(user, items, today, history, context=context)))
            # As of a moment since when more has happened than a service keeps of a user.
            now = impressions[4].ts_ms
            assert len(impressions) > 4 + ranker.max_history
            then = RankQuery(user, items, now, [each for each in impressions if each.ts_ms <= now])
            as_told(service.rank(user, candidates=items, now_ms=now).json(), ranker.rank(then))
        assert service.client.get("/v1/model").json()["version"] == ranker.version


def as_told(answer: dict[str, Any], expected: RankedList) -> None:
    same = from_json(to_json(schema.rank_response(expected, list(expected.fallbacks)), inf_nan_mode="null"))
    assert numbers_apart(answer) == numbers_apart(same)
    assert probabilities(answer) == pytest.approx(probabilities(same), abs=1e-5)


def numbers_apart(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "candidates": [(each["item"], each["known"]) for each in answer["candidates"]]}


def probabilities(answer: dict[str, Any]) -> list[float]:
    return [chance for each in answer["candidates"] for _, chance in sorted(each["probability"].items())]
