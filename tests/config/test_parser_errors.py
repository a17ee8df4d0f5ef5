"""One-line texts of the parser's errors."""

from typing import Any

import pytest

from a2gen_rec.config.parse import config_from_dict
from a2gen_rec.data.sources.spec import ImpressionsSpec, parse_spec
from a2gen_rec.errors import ConfigError

SPEC: dict[str, Any] = {
    "kind": "impressions",
    "name": "log",
    "files": "*.csv",
    "time_unit": "s",
    "columns": {"user": "u", "item": "i", "time": "t"},
    "actions": {"like": {"flag": "liked"}},
}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"train": {"epochs": "many"}}, "train.epochs: must be an integer, not 'many'"),
        ({"model": {"name": "tree"}}, "model.name: unknown value 'tree'; choose one of a2gen, mmoe, ple, hstu, gbdt"),
        ({"train": {"epoch": 3}}, "unknown setting 'train.epoch'"),
        ({"loss": {"objective_weights": {"glance": "x"}}}, "loss.objective_weights: must be a number, not 'x'"),
    ],
)
def test_setting(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(settings)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"columns": {"user": "u"}}, "required, but missing: columns.item, columns.time"),
        ({"colums": "u"}, "unknown key 'colums'"),
        ({"actions": {"like": "liked"}}, "actions: must be a mapping, not 'liked'"),
        ({"time_unit": "h"}, "time_unit: unknown value 'h'; choose one of s, ms, us, ns, timestamp"),
        (
            {"features": [{"name": "city", "level": "place"}]},
            "features.level: unknown value 'place'; choose one of user, item, context",
        ),
        ({"features": [{"name": "city", "levl": "user"}]}, "features: unknown key 'levl'"),
    ],
)
def test_spec(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_spec(ImpressionsSpec, SPEC | change, "log.yaml")
    assert str(error.value) == f"log.yaml: {text}"
