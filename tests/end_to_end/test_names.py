"""Any name of a feature, action or label passes from the log to a ranked list, or is rejected by ``prepare``."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.names import check_names
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.errors import DataError
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.runs.rank import rank_run
from a2gen_rec.training.entrypoint import train
from tests.helpers.cards import short_training

CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, max_history=4, max_targets=3)
LEVELS = ("item", "context", "user")
KINDS = ({"kind": "vocabulary"}, {"kind": "hash", "size": 5}, {"kind": "buckets", "size": 3})
HELPERS = ["row", "broken", "partition", "place", "total", "position", "problem", "value", "count", "rank", "raw"]
MODULES = ["type", "training", "forward", "to", "keys", "values", "items", "train", "float", "parameters"]
OUTCOMES = ["row", "total", "type", "training", "like", "mean", "auc", "value", "loss", "time"]


def write_log(folder: Path, features: list[str], actions: list[str], labels: list[str], method: str) -> Path:
    """Write a log and its spec; every feature, action and label has a column ``c<number>``."""
    rng, count = np.random.default_rng(0), 150
    names = [*features, *actions, *labels]
    columns: dict[str, object] = {
        "u": [f"u{n}" for n in rng.integers(0, 6, count)],
        "i": [f"i{n}" for n in rng.integers(0, 9, count)],
        "t": 1_700_000_000_000 + np.cumsum(rng.integers(1, 10**6, count)),
        "w": rng.exponential(9, count),
        "d": rng.uniform(5, 20, count),
    }
    columns |= {f"c{n}": rng.integers(0, 2, count) for n in range(len(names))}
    column_of = {("feature", name): f"c{n}" for n, name in enumerate(features)}
    column_of |= {("outcome", name): f"c{len(features) + n}" for n, name in enumerate([*actions, *labels])}
    spec = {
        "kind": "impressions",
        "columns": {"user": "u", "item": "i", "time": "t", "dwell_s": "w"},
        "actions": {name: {"flag": column_of["outcome", name]} for name in actions},
        "labels": {name: column_of["outcome", name] for name in labels},
        "features": [
            {"name": name, "column": column_of["feature", name], "level": LEVELS[n % 3], **KINDS[n // 3 % 3]}
            for n, name in enumerate(features)
        ]
        + [{"name": "seconds", "column": "d", "level": "item", "kind": "buckets", "size": 3}],
        "duration_feature": "seconds",
        "split": {"method": method, "valid_fraction": 0.2, "test_fraction": 0.2},
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "log.parquet")
    (folder.parent / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
    return folder


def run(folder: Path, features: list[str], actions: list[str], labels: list[str], method: str = "time") -> DatasetCard:
    """Prepare, train one step, export and rank."""
    raw = str(write_log(folder / "raw", features, actions, labels, method))
    card = prepare("generic", raw, str(folder / "data"), CONFIG, str(folder / "spec.yaml"))
    config = short_training(1, feedback_encoding="tokens", session_features=True, predict_objectives=True)
    train(config, str(folder / "data"), str(folder / "run"))
    export_run(str(folder / "run"), str(folder / "model"), max_auc_drop=1.0)
    assert {p for candidate in rank_run(str(folder / "run"), "u1").candidates for p in candidate.probability} >= {
        *actions,
        *labels,
    }
    ranker = Ranker.load(str(folder / "model"))
    history = [Impression("i1", 1_700_000_000_000, 3.0, [(name, None) for name in actions])]
    (best, *_) = ranker.rank(RankQuery("u1", ["i1", "i2"], history=history)).candidates
    assert best.probability.keys() >= {*actions, *labels}
    assert sorted(path.name for path in folder.iterdir()) == ["data", "model", "raw", "run", "spec.yaml"]
    return card


@pytest.mark.parametrize(
    ("features", "actions", "labels", "method"),
    [(HELPERS, OUTCOMES[::2], OUTCOMES[1::2], "last"), (MODULES, OUTCOMES[1::2], OUTCOMES[::2], "time")],
)
def test_names_of_helpers_and_modules_work(
    features: list[str], actions: list[str], labels: list[str], method: str, tmp_path: Path
) -> None:
    card = run(tmp_path, features, actions, labels, method)
    assert [feature.name for feature in card.features][2 : 2 + len(features)] == features
    assert (card.predicted_actions, card.labels) == (actions, labels)


def test_names_of_helpers_of_event_logs_work(tmp_path: Path) -> None:
    features = ["rank", "starts", "segment", "opened_ms", "opened", "row", "number", "violation", "thread", "events"]
    rows, users = 60, 5
    columns: dict[str, object] = {
        "u": [f"u{n % users}" for n in range(rows)],
        "i": [f"i{n // (2 * users)}" for n in range(rows)],
        "t": [1_700_000_000_000 + 1000 * n for n in range(rows)],
        "a": ["open" if n // users % 2 == 0 else "Row" for n in range(rows)],
    }
    columns |= {name: [f"{name}{n % 3}" for n in range(rows)] for name in features}
    spec = {
        "kind": "events",
        "columns": {"user": "u", "item": "i", "time": "t", "action": "a"},
        "open_event": "open",
        "actions": {"Row": "Row"},
        "features": [{"name": name, "level": LEVELS[n % 3]} for n, name in enumerate(features)],
        "split": {"valid_fraction": 0.2, "test_fraction": 0.2},
    }
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "raw" / "log.parquet")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    card = prepare("generic", str(tmp_path / "raw"), str(tmp_path / "data"), CONFIG, str(tmp_path / "spec.yaml"))
    assert sum(split.targets for split in card.splits.values()) == rows / 2
    assert sum(split.positives["Row"] for split in card.splits.values()) == rows / 2
    assert {
        feature.name: feature.cardinality for feature in card.features if feature.name in features
    } == dict.fromkeys(features, 4)


NAMES = st.lists(
    st.text(st.characters(codec="utf-8", categories=["L", "N", "Pc", "Pd"]), min_size=1, max_size=12), max_size=5
)


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, NAMES, NAMES)
def test_random_names_work_or_are_rejected(
    tmp_path_factory: pytest.TempPathFactory, features: list[str], actions: list[str], labels: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    try:
        check_names(["user_id", "item_id", "seconds", *features], [*actions, *labels])
    except DataError:
        raw = str(write_log(folder / "raw", features, actions, labels, "time"))
        with pytest.raises(DataError) as caught:
            prepare("generic", raw, str(folder / "data"), CONFIG, str(folder / "spec.yaml"))
        assert len(str(caught.value).splitlines()) == 1
        assert not (folder / "data").exists()
        return
    run(folder, features, actions, labels)
