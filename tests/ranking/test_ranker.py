"""Ranking by an exported model: what a request's answer may depend on, and what a damaged folder is refused for."""

import dataclasses
import json
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

NAMES = [f"i{number}" for number in range(12)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, str]:
    folder = tmp_path_factory.mktemp("ranker")
    log = hashed_log(folder)
    export_run(log.run, str(folder / "model"))
    return log, str(folder / "model")


@pytest.fixture
def ranker(world: tuple[Log, str]) -> Ranker:
    return Ranker.load(world[1])


def request_of(ranker: Ranker, log: Log, user: str = "u1", **options: object) -> RankQuery:
    history = ranker.encode(log.impressions[user])
    return RankQuery(user, NAMES, **{"history": history, "k": len(NAMES), **options})  # type: ignore[arg-type]


def same(one: RankedList, other: RankedList, within: float) -> None:
    """Equal but for rounding, of what may be equal then."""
    assert [each.item for each in one.candidates] == [each.item for each in other.candidates]
    for a, b in zip(one.candidates, other.candidates, strict=True):
        assert list(a.probability.values()) == pytest.approx(list(b.probability.values()), abs=within)
        assert a.expected_watch_s == pytest.approx(b.expected_watch_s, rel=10 * within, abs=10 * within)
        assert [name for name, _ in a.timeline] == [name for name, _ in b.timeline]
    assert dataclasses.replace(one, candidates=[]) == dataclasses.replace(other, candidates=[])


def test_the_order_and_number_of_mentions_of_candidates_do_not_matter(world: tuple[Log, str], ranker: Ranker) -> None:
    asked = request_of(ranker, world[0])
    expected = ranker.rank(asked)
    assert expected.num_candidates == len(expected.candidates) == len(NAMES)
    rng = np.random.default_rng(0)
    for _ in range(3):
        names = [*rng.permutation(NAMES).tolist(), *rng.choice(NAMES, 3).tolist()]
        assert ranker.rank(dataclasses.replace(asked, candidates=names)) == expected
    assert ranker.rank(dataclasses.replace(asked, k=1000)) == expected
    few = ranker.rank(dataclasses.replace(asked, k=3))
    assert few.candidates == expected.candidates[:3]
    seconds = [each.expected_watch_s for each in expected.candidates]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] != seconds[-1]


def test_the_sql_of_an_artifact_reads_no_file(ranker: Ranker) -> None:
    with pytest.raises(duckdb.PermissionException):
        ranker._encoder.connection.execute("FROM read_text('/etc/hostname')")


def test_no_request_of_a_batch_changes_another_s_answer(world: tuple[Log, str], ranker: Ranker) -> None:
    log = world[0]
    requests = [
        request_of(ranker, log, "u1"),
        dataclasses.replace(request_of(ranker, log, "u2"), k=2, sort_by="like", candidates=NAMES[:5]),
        RankQuery("nobody", ["i3", "?"], now_ms=10**12),
        dataclasses.replace(request_of(ranker, log, "u3"), sort_by="hate", include_timelines=False),
    ]
    alone = [ranker.rank(each) for each in requests]
    for one, other in zip(ranker.rank_batch(requests), alone, strict=True):
        same(one, other, 1e-6)
    assert [len(each.candidates) for each in alone] == [12, 2, 2, 12]
    assert alone[3].ascending
    assert not alone[3].candidates[0].timeline
    assert ranker.rank_batch([]) == []


def test_states_are_the_same_cold_warm_and_partly_dropped(world: tuple[Log, str]) -> None:
    log, folder = world
    # A state of 8 float32 and its name take 232 bytes: room for all, for some of one history, and for none.
    whole, some, none = (Ranker.load(folder, cache_bytes=size) for size in (10**6, 5 * 232, 100))
    asked = request_of(whole, log)
    length = len(asked.history)
    cold = none.rank(asked)
    for ranker in (whole, whole, some, some, none):
        same(ranker.rank(asked), cold, 1e-6)
    assert (whole.cache_stats.hits, whole.cache_stats.misses, whole.cache_stats.states) == (length, length, length)
    assert (some.cache_stats.hits, some.cache_stats.misses, some.cache_stats.states) == (5, 2 * length - 5, 5)
    assert (none.cache_stats.hits, none.cache_stats.states, none.cache_stats.bytes) == (0, 0, 0)
    assert some.cache_stats.bytes <= 5 * 232
    more = whole.encode([Impression("i5", 2 * 10**12, 3.0, [("like", None)], {"speed": 1.0})], asked.history)
    whole.rank(dataclasses.replace(asked, history=more))
    assert whole.cache_stats.misses == length + 1


def test_what_is_unknown_is_ranked_by_row_zero_and_told(world: tuple[Log, str], ranker: Ranker) -> None:
    log = world[0]
    asked = RankQuery("nobody", ["?", "??", "i1"], now_ms=10**12)
    found = ranker.rank(asked)
    assert found.fallbacks == ("unknown_user", "unknown_items", "empty_history")
    assert (found.history_length, found.unknown_items, found.model_version) == (0, 2, ranker.version)
    by_name = {each.item: each for each in found.candidates}
    assert by_name["?"].probability == by_name["??"].probability != by_name["i1"].probability
    assert [by_name[name].known for name in ("?", "i1")] == [False, True]
    same(ranker.rank(dataclasses.replace(asked, user="someone")), dataclasses.replace(found, user="someone"), 0.0)
    city = pq.read_table(f"{log.data}/vocabulary/city.parquet")["value"][0].as_py()
    given = ranker.rank(dataclasses.replace(asked, user_features={"city": city}))
    assert given.candidates[0].probability != found.candidates[0].probability
    known = ranker.rank(request_of(ranker, log))
    assert known.fallbacks == ()
    assert known.history_length == 9  # of the model, not of the log


def test_a_loaded_model_is_no_longer_its_files(world: tuple[Log, str], tmp_path: Path) -> None:
    log, folder = world
    ranker = Ranker.load(shutil.copytree(folder, str(tmp_path / "model")), cache_bytes=0)
    asked = request_of(ranker, log)
    expected = ranker.rank(asked)
    for name in ("tables.safetensors", "dense.safetensors"):
        file = tmp_path / "model" / name
        with file.open("r+b") as written:  # as `cp` does: the same file, other bytes
            written.write(b"\x2a" * file.stat().st_size)
    assert ranker.rank(asked) == expected
    for name in ("tables.safetensors", "dense.safetensors"):
        (tmp_path / "model" / name).write_bytes(b"")
    assert ranker.rank(asked) == expected


def test_without_any_past_the_moment_is_now(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10**12 + 5 * 3_600_000
    monkeypatch.setattr("a2gen_rec.ranking.window.now_ms", lambda: now)
    asked = RankQuery("nobody", NAMES)
    assert ranker.rank(asked) == ranker.rank(dataclasses.replace(asked, now_ms=now))
    assert ranker.rank(asked).candidates != ranker.rank(dataclasses.replace(asked, now_ms=0)).candidates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "no candidates"),
        ({"k": 0}, "k 0 must be at least 1"),
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
    ],
)
def test_an_unusable_request_ends_with_a_clear_line(ranker: Ranker, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        ranker.rank_batch([RankQuery("u1", NAMES), dataclasses.replace(RankQuery("u1", NAMES), **change)])
    assert "\n" not in str(raised.value)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def newer(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))


def tampered(file: Path) -> None:
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
        ("manifest.json", newer, "manifest.json: unsupported format version 2, expected 3"),
        ("manifest.json", tampered, "manifest.json: corrupted"),
        ("manifest.json", Path.unlink, "no exported model found"),
    ],
)
def test_a_damaged_model_is_refused(
    world: tuple[Log, str], tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(world[1], tmp_path / "model")
    damage(tmp_path / "model" / name)
    with pytest.raises(UserError, match=message) as raised:
        Ranker.load(str(tmp_path / "model"))
    assert "\n" not in str(raised.value)


def test_serving_needs_nothing_of_training() -> None:
    code = (
        "import sys, pkgutil, importlib, a2gen_rec.ranking as ranking, a2gen_rec.serving as serving\n"
        "for package in (ranking, serving):\n"
        "    for each in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(each.name)\n"
        "print([name for name in sys.modules if name.startswith('a2gen_rec.training')])\n"
        "import torch.distributed as dist; print(dist.is_initialized())\n"
    )
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split("\n")[:2] == ["[]", "False"]


def test_a_folder_without_training_code_ranks_on_the_command_line(
    world: tuple[Log, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "items").write_text("\n".join(NAMES))
    main(["rank", "--model", world[1], "--user", "nobody", "--candidates", str(tmp_path / "items"), "--k", "3"])
    told = capsys.readouterr().out
    best = Ranker.load(world[1]).rank(RankQuery("nobody", NAMES, k=3))
    assert all(each.item in told for each in best.candidates)
    assert "user not in the dataset" in told
    (tmp_path / "CURRENT").write_text("model\n")
    (tmp_path / "model").symlink_to(world[1])
    main(["rank", "--model", str(tmp_path), "--user", "nobody", "--candidates", str(tmp_path / "items"), "--k", "3"])
    assert capsys.readouterr().out == told, "the model that a service of this folder would have"


def test_an_exported_model_is_ranked_with_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rank", "--model", "m", "--user", "u", "--candidates", "file", "--device", "cuda"])
    assert "exported models run on CPU only; drop --device cuda" in capsys.readouterr().err
