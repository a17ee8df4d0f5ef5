"""Ranking with an exported model: invariances of the results, invalid requests and corrupted files."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankedList, RankQuery
from a2gen_rec.runs.export import export_run
from tests.helpers.logs import Log, hashed_log

pytestmark = pytest.mark.training

NAMES = [f"i{number}" for number in range(12)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, str]:
    folder = tmp_path_factory.mktemp("ranker")
    log = hashed_log(folder)
    export_run(log.run, str(folder / "model"))
    return log, str(folder / "model")


@pytest.fixture
def ranker(exported: tuple[Log, str]) -> Ranker:
    return Ranker.load(exported[1])


PROGRAM = """
import sys, a2gen_rec as a2
a2.Ranker.load(sys.argv[1]).rank(a2.RankQuery("u1", ["i1"], k=1))
print("ranked")
print("ranked", file=sys.stderr)
import pkgutil, importlib, a2gen_rec.ranking as ranking, a2gen_rec.serving as serving
for package in (ranking, serving):
    for each in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(each.name)
print([name for name in sys.modules if name.startswith("a2gen_rec.training")])
import torch.distributed as dist; print(dist.is_initialized())
"""
"""Ranks, then imports all modules of ranking and serving."""


@pytest.fixture(scope="module")
def program(exported: tuple[Log, str]) -> subprocess.CompletedProcess[str]:
    """The output of a program that ranks in a new interpreter."""
    command = [sys.executable, "-c", PROGRAM, exported[1]]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_first_ranking_in_a_program_prints_nothing(program: subprocess.CompletedProcess[str]) -> None:
    assert (program.stdout.partition("ranked\n")[0], program.stderr.partition("ranked\n")[0]) == ("", "")


def make_request(ranker: Ranker, log: Log, user: str = "u1", **options: object) -> RankQuery:
    history = ranker.encode(log.impressions[user])
    return RankQuery(user, NAMES, **{"history": history, "k": len(NAMES), **options})  # type: ignore[arg-type]


def assert_same(one: RankedList, other: RankedList, within: float) -> None:
    """Check that two lists are equal up to rounding."""
    assert [candidate.item for candidate in one.candidates] == [candidate.item for candidate in other.candidates]
    for a, b in zip(one.candidates, other.candidates, strict=True):
        assert list(a.probability.values()) == pytest.approx(list(b.probability.values()), abs=within)
        assert a.expected_watch_s == pytest.approx(b.expected_watch_s, rel=10 * within, abs=10 * within)
        assert [name for name, _ in a.timeline] == [name for name, _ in b.timeline]
    assert dataclasses.replace(one, candidates=[]) == dataclasses.replace(other, candidates=[])


def test_order_and_duplicates_of_candidates_do_not_matter(exported: tuple[Log, str], ranker: Ranker) -> None:
    request = make_request(ranker, exported[0])
    expected = ranker.rank(request)
    assert expected.num_candidates == len(expected.candidates) == len(NAMES)
    rng = np.random.default_rng(0)
    for _ in range(3):
        names = [*rng.permutation(NAMES).tolist(), *rng.choice(NAMES, 3).tolist()]
        assert ranker.rank(dataclasses.replace(request, candidates=names)) == expected
    assert ranker.rank(dataclasses.replace(request, k=1000)) == expected
    few = ranker.rank(dataclasses.replace(request, k=3))
    assert few.candidates == expected.candidates[:3]
    seconds = [candidate.expected_watch_s for candidate in expected.candidates]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] != seconds[-1]


def test_sql_cannot_read_files(ranker: Ranker) -> None:
    with pytest.raises(duckdb.PermissionException):
        ranker._encoder.connection.execute("FROM read_text('/etc/hostname')")


def test_requests_of_a_batch_are_independent(exported: tuple[Log, str], ranker: Ranker) -> None:
    log = exported[0]
    requests = [
        make_request(ranker, log, "u1"),
        dataclasses.replace(make_request(ranker, log, "u2"), k=2, sort_by="like", candidates=NAMES[:5]),
        RankQuery("nobody", ["i3", "?"], now_ms=10**12),
        dataclasses.replace(make_request(ranker, log, "u3"), sort_by="hate", include_timelines=False),
    ]
    alone = [ranker.rank(request) for request in requests]
    for one, other in zip(ranker.rank_batch(requests), alone, strict=True):
        assert_same(one, other, 1e-6)
    assert [len(ranking.candidates) for ranking in alone] == [12, 2, 2, 12]
    assert alone[3].ascending
    assert not alone[3].candidates[0].timeline
    assert ranker.rank_batch([]) == []


def test_cached_states_do_not_change_the_ranking(exported: tuple[Log, str]) -> None:
    log, folder = exported
    # A state of 8 float32 values and its key take 232 bytes: space for all, for some of one history, and for none.
    all_cached, some_cached, none_cached = (Ranker.load(folder, cache_bytes=size) for size in (10**6, 5 * 232, 100))
    request = make_request(all_cached, log)
    length = len(request.history)
    cold = none_cached.rank(request)
    for ranker in (all_cached, all_cached, some_cached, some_cached, none_cached):
        assert_same(ranker.rank(request), cold, 1e-6)
    assert (all_cached.cache_stats.hits, all_cached.cache_stats.misses, all_cached.cache_stats.states) == (
        length,
        length,
        length,
    )
    assert (some_cached.cache_stats.hits, some_cached.cache_stats.misses, some_cached.cache_stats.states) == (
        5,
        2 * length - 5,
        5,
    )
    assert (none_cached.cache_stats.hits, none_cached.cache_stats.states, none_cached.cache_stats.bytes) == (0, 0, 0)
    assert some_cached.cache_stats.bytes <= 5 * 232
    more = all_cached.encode([Impression("i5", 2 * 10**12, 3.0, [("like", None)], {"speed": 1.0})], request.history)
    all_cached.rank(dataclasses.replace(request, history=more))
    assert all_cached.cache_stats.misses == length + 1


def test_unknown_users_and_items_use_row_zero(exported: tuple[Log, str], ranker: Ranker) -> None:
    log = exported[0]
    request = RankQuery("nobody", ["?", "??", "i1"], now_ms=10**12)
    ranking = ranker.rank(request)
    assert ranking.fallbacks == ("unknown_user", "unknown_items", "empty_history")
    assert (ranking.history_length, ranking.unknown_items, ranking.model_version) == (0, 2, ranker.version)
    by_name = {candidate.item: candidate for candidate in ranking.candidates}
    assert by_name["?"].probability == by_name["??"].probability != by_name["i1"].probability
    assert [by_name[name].known for name in ("?", "i1")] == [False, True]
    assert_same(
        ranker.rank(dataclasses.replace(request, user="someone")), dataclasses.replace(ranking, user="someone"), 0.0
    )
    city = pq.read_table(f"{log.data}/vocabulary/city.parquet")["value"][0].as_py()
    with_city = ranker.rank(dataclasses.replace(request, user_features={"city": city}))
    assert with_city.candidates[0].probability != ranking.candidates[0].probability
    known = ranker.rank(make_request(ranker, log))
    assert known.fallbacks == ()
    assert known.history_length == 9  # the limit of the model, not the length in the log


def test_loaded_model_is_independent_of_its_files(exported: tuple[Log, str], tmp_path: Path) -> None:
    log, folder = exported
    ranker = Ranker.load(shutil.copytree(folder, str(tmp_path / "model")), cache_bytes=0)
    request = make_request(ranker, log)
    expected = ranker.rank(request)
    for name in ("tables.safetensors", "dense.safetensors"):
        file = tmp_path / "model" / name
        with file.open("r+b") as written:  # like `cp`: the same file, other bytes
            written.write(b"\x2a" * file.stat().st_size)
    assert ranker.rank(request) == expected
    for name in ("tables.safetensors", "dense.safetensors"):
        (tmp_path / "model" / name).write_bytes(b"")
    assert ranker.rank(request) == expected


def test_default_query_time_without_history_is_now(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10**12 + 5 * 3_600_000
    monkeypatch.setattr("a2gen_rec.ranking.window.now_ms", lambda: now)
    request = RankQuery("nobody", NAMES)
    assert ranker.rank(request) == ranker.rank(dataclasses.replace(request, now_ms=now))
    assert ranker.rank(request).candidates != ranker.rank(dataclasses.replace(request, now_ms=10**12)).candidates


MASKED = np.ma.array([1.0, 2.0], mask=[True, False])
T = 1_700_000_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "no candidates"),
        ({"candidates": np.array(["i1", "i2"])}, r"candidates must be a list of texts, not array\(\['i1', 'i2'\]"),
        ({"candidates": "i1"}, "candidates must be a list of texts, not 'i1'"),
        ({"candidates": ["i1", math.nan]}, "candidates must be a text, not nan"),
        ({"candidates": ["i1", np.ma.masked]}, "candidates must be a text, not masked"),
        ({"candidates": ["i1", 2]}, "candidates must be a text, not 2"),
        ({"user": 3}, "user must be a text, not 3"),
        ({"user": math.nan}, "user must be a text, not nan"),
        ({"k": 0}, "k 0 must be a whole number of at least 1"),
        ({"k": math.nan}, "k nan must be a whole number of at least 1"),
        ({"context": {"speed": np.ma.masked}}, "'speed' must be a number, not masked"),
        ({"context": {"speed": MASKED}}, r"'speed' must be a number, not masked_array\(data="),
        ({"user_features": {"city": np.zeros(99)}}, r"'city' must be a text, not array\(\[0\., .*…$"),
        ({"history": [Impression("i1", T, watch_s=MASKED)]}, r"at least 0 seconds, not masked_array\(data="),
        ({"history": [Impression("i1", T, watch_s=math.nan)]}, "times must be at least 0 seconds, not nan"),
        ({"history": [Impression("i1", T, watch_s="4")]}, "times must be at least 0 seconds, not '4'"),
        ({"history": [Impression("i1", T, watch_s=True)]}, "times must be at least 0 seconds, not True"),
        ({"history": [Impression("i1", T, actions=[("like", MASKED)])]}, r"0 seconds, not masked_array\("),
        ({"history": [Impression("i1", T, actions=[("like", np.ma.masked)])]}, "0 seconds, not masked"),
        ({"history": [Impression(math.nan, T)]}, "item of an impression must be a text, not nan"),
        ({"history": [Impression(np.ma.masked, T)]}, "item of an impression must be a text, not masked"),
        ({"history": [Impression("i1", MASKED)]}, r"ts_ms must be an integer, not masked_array\(data="),
        ({"sort_by": "likes"}, "unknown sort key 'likes'"),
        ({"context": {"tabs": "a"}}, "unknown feature 'tabs'; available: tab, speed, network"),
        ({"context": {"hour_of_day": "3"}}, "unknown feature 'hour_of_day'"),
        ({"context": {"speed": "fast"}}, "'speed' must be a number, not 'fast'"),
        ({"user_features": {"town": "a"}}, "unknown feature 'town'; available: city"),
        ({"user_features": {"user_id": "u1"}}, "unknown feature 'user_id'; available: city"),
        (
            {"history": [Impression("i1", 5, actions=[("likes", 1.0)])]},
            "unknown action 'likes'; choose one of like, comment",
        ),
        ({"history": [Impression("i1", 5, actions=[("like", 1.0), ("like", 2.0)])]}, "duplicate action"),
        ({"history": [Impression("i1", 5, watch_s=-1.0)]}, "times must be at least 0 seconds"),
        ({"history": [Impression("i1", 5, features={"item_id": "i2"})]}, "unknown feature 'item_id'"),
        (
            {"history": [Impression("i1", 1_796_060_043)]},
            "impression of 'i1': ts_ms 1796060043 is before the year 2000; "
            "expected milliseconds since 1970, not seconds",
        ),
        ({"history": [Impression("i1", 0)]}, "ts_ms 0 is before the year 2000; expected milliseconds since 1970$"),
        ({"history": [Impression("i1", -(10**12))]}, "ts_ms -1000000000000 is before the year 2000"),
        ({"history": [Impression("i1", 946_684_799_999)]}, "ts_ms 946684799999 is before the year 2000"),
        ({"history": [Impression("i1", 1_796_060_043_000_000)]}, "after the year 9999; expected .* not microseconds"),
        ({"history": [Impression("i1", 1_796_060_043_000.5)]}, "ts_ms must be an integer, not 1796060043000.5"),
        ({"history": [Impression("i1", True)]}, "ts_ms must be an integer, not True"),
        ({"history": [Impression("i1", "1796060043000")]}, "ts_ms must be an integer, not '1796060043000'"),
        ({"now_ms": 1_796_060_043}, "request: now_ms 1796060043 is before the year 2000; .* not seconds"),
        ({"now_ms": 1_796_060_043_000_000_000}, "request: now_ms 1796060043000000000 is after the year 9999"),
        ({"now_ms": 1_796_060_043.5}, "request: now_ms must be an integer, not 1796060043.5"),
    ],
)
def test_rejects_invalid_requests(ranker: Ranker, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        ranker.rank_batch([RankQuery("u1", NAMES), dataclasses.replace(RankQuery("u1", NAMES), **change)])
    assert "\n" not in str(raised.value)


def test_numbers_of_numpy_and_missing_features(ranker: Ranker) -> None:
    def encoded(number: type, speed: float | None) -> dict:
        features = {"speed": speed, "tab": speed}
        impression = Impression("i1", T, watch_s=number(3), actions=[("like", number(2))], features=features)
        columns = ranker.encode([impression]).columns
        return {name: getattr(columns, name).tolist() for name in ("action", "offset_s", "end_ms")} | {
            name: rows.tolist() for name, rows in columns.impression_ids.items()
        }

    # As in a log, NaN is a missing feature.
    assert encoded(float, None) == encoded(np.float32, math.nan) == encoded(np.int64, np.float64("nan"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_format(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))


def change_dtype(file: Path) -> None:
    file.write_text(file.read_text().replace('"int8"', '"fp32"'))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tables.safetensors", Path.unlink, "tables.safetensors: not found"),
        ("tables.safetensors", truncate, r"tables.safetensors: size is \d+ bytes, expected \d+: truncated"),
        ("dense.safetensors", flip, "dense.safetensors: corrupted: SHA-256"),
        ("vocabulary/tab.parquet", flip, "vocabulary/tab.parquet: corrupted"),
        ("dataset.yaml", truncate, "dataset.yaml: size is"),
        ("manifest.json", truncate, "manifest.json: invalid manifest"),
        ("manifest.json", other_format, "manifest.json: unsupported format version 2, expected 5"),
        ("manifest.json", change_dtype, "manifest.json: corrupted"),
        ("manifest.json", Path.unlink, "no exported model found"),
    ],
)
def test_rejects_corrupted_models(
    exported: tuple[Log, str], tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(exported[1], tmp_path / "model")
    damage(tmp_path / "model" / name)
    with pytest.raises(UserError, match=message) as raised:
        Ranker.load(str(tmp_path / "model"))
    assert "\n" not in str(raised.value)


def test_serving_imports_no_training_code(program: subprocess.CompletedProcess[str]) -> None:
    assert program.stdout.splitlines() == ["ranked", "[]", "False"]


def test_exported_model_ranks_on_the_command_line(
    exported: tuple[Log, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "items").write_text("\n".join(NAMES))
    main(["rank", "--model", exported[1], "--user", "nobody", "--candidates", str(tmp_path / "items"), "--k", "3"])
    output = capsys.readouterr().out
    best = Ranker.load(exported[1]).rank(RankQuery("nobody", NAMES, k=3))
    assert all(candidate.item in output for candidate in best.candidates)
    assert "user not in the dataset" in output
    (tmp_path / "CURRENT").write_text("model\n")
    (tmp_path / "model").symlink_to(exported[1])
    main(["rank", "--model", str(tmp_path), "--user", "nobody", "--candidates", str(tmp_path / "items"), "--k", "3"])
    assert capsys.readouterr().out == output, "CURRENT selects the model, as in the service"


def test_exported_models_run_on_cpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rank", "--model", "m", "--user", "u", "--candidates", "file", "--device", "cuda"])
    assert "exported models run on CPU only; drop --device cuda" in capsys.readouterr().err
