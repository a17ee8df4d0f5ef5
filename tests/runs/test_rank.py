import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from a2gen_rec.cli.main import main
from a2gen_rec.config import Config, EnsembleConfig
from a2gen_rec.data.batch import FULL_WINDOW
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import CandidateItems, WindowColumns
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.items import find_candidate_items, popular_items
from a2gen_rec.data.schema import SPLITS
from a2gen_rec.ensemble.fit import train_ensemble
from a2gen_rec.ensemble.trainer import EpochResult
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.ensemble.io import EnsembleCard, load_ensemble, save_ensemble
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.factory import build_model
from a2gen_rec.nn.decoding import DecodedSequences
from a2gen_rec.ranking.selection import resolve_sort_key
from a2gen_rec.ranking.timelines import timelines
from a2gen_rec.ranking.types import RankedList, ScoredCandidate
from a2gen_rec.runs import rank as run_ranking
from a2gen_rec.runs.next_window import append_candidates_now, empty_window, read_latest_window
from a2gen_rec.runs.rank import rank_run
from a2gen_rec.training.entrypoint import train
from a2gen_rec.training.loaded_run import LoadedRun, load_run
from tests.helpers.cards import (
    full_tables,
    make_card,
    make_columns,
    short_training,
    small_config,
    to_table,
    write_dataset,
)

pytestmark = pytest.mark.training

CARD = make_card()
NAMES = ["like", "comment", "follow", "click"]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    data: Path
    run: Path
    user: str  # has a window in the test split


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("rank")
    data, run = write_dataset(folder / "data", CARD, windows=25), folder / "run"
    config = short_training(5)
    config.optim.dense_lr = 0.02
    config.loader.max_impressions_per_batch, config.evaluate.max_unexplored_mass = 200, 0.05
    train(config, str(data), str(run))
    table = pq.read_table(data / "test" / "part-00001.parquet")
    lengths = table["ts_ms"].combine_chunks().value_lengths().to_numpy()
    return TrainedRun(data, run, table["user"][int(np.flatnonzero(lengths > CARD.max_history)[0])].as_py())


def ranked(trained_run: TrainedRun, file: Path, lines: str, **options: str) -> RankedList:
    file.write_text(lines)
    return rank_run(str(trained_run.run), options.pop("user", trained_run.user), str(file), **options)


def some_items(rows: np.ndarray) -> CandidateItems:
    ids = {"item_id": rows, "author_id": rows * 7 % 9}
    statistics = np.random.default_rng(3).normal(size=(50, len(CARD.statistics))).astype(np.float16)[rows]
    return CandidateItems(
        [f"item-{row}" for row in rows], np.ones(len(rows), bool), ids, statistics, np.zeros((len(rows), 0))
    )


def one_window(length: int, seed: int = 1) -> WindowColumns:
    columns = make_columns(CARD, 40, np.random.default_rng(seed))
    return columns.take(np.flatnonzero(columns.lengths == length)[:1])


def make_model(config: Config) -> RankingModel:
    torch.manual_seed(0)
    model = build_model(CARD, config, torch.device("cpu"))
    for parameter in model.parameters():  # random values, so that every parameter matters
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@torch.no_grad()
def predictions(model: RankingModel, columns: WindowColumns, candidates: bool) -> torch.Tensor:
    """Return all outputs that enter a ranking, one row per target."""
    output = model(
        collate(
            columns,
            np.arange(len(columns)),
            full_tables(CARD, small_config()),
            request_gap_s=FULL_WINDOW if candidates else None,
        )
    )
    marginals, best = model.ranker.marginals(output, max_unexplored_mass=0.1), model.ranker.decode(output, 4)
    time = torch.full((len(marginals.time), len(CARD.actions)), torch.nan)
    time[:, : best.time.shape[2]] = best.time[:, 0]
    times = torch.nan_to_num(torch.cat([marginals.time, time], 1), nan=-1.0)
    return torch.cat([marginals.probability, output.label_probability, best.log_probability[:, :1], times], 1)


# Maximum history shorter than, equal to and longer than the window.
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"max_history": 3},
        {"attention_impl": "reference", "max_history": 9},
        {"generator": "implicit", "recency_bias": False},
    ],
)
@pytest.mark.parametrize("length", [0, 9])
def test_candidates_in_one_window_equal_one_window_each(variant: dict, length: int) -> None:
    model, items = make_model(small_config(**variant)), some_items(np.arange(1, 7))
    history = one_window(length) if length else empty_window(CARD)
    joint = predictions(model, append_candidates_now(history, items, CARD), candidates=True)
    alone = [
        predictions(model, append_candidates_now(history, some_items(np.array([row])), CARD), candidates=False)
        for row in range(1, 7)
    ]
    torch.testing.assert_close(joint, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert joint[:, 1:-1].std(0).max() > 1e-2, "candidates must differ"


def test_consecutive_targets_would_lose_the_history() -> None:
    columns = append_candidates_now(one_window(9), some_items(np.arange(1, 7)), CARD)
    model = make_model(small_config())
    same = torch.isclose(predictions(model, columns, True), predictions(model, columns, False)).all(1)
    # The model reads the last 6 of 9 impressions; only the first candidate directly follows them.
    assert same.tolist() == [True] + [False] * 5


def test_placeholder_actions_of_candidates_are_not_read() -> None:
    history, model = one_window(9), make_model(small_config())
    columns = append_candidates_now(history, some_items(np.arange(1, 7)), CARD)
    count, past = 6, len(history.action)
    lengths = np.append(history.action_lengths, np.full(count, 4))
    other = dataclasses.replace(
        columns,
        labels=np.nan_to_num(columns.labels, nan=1.0),
        action_starts=np.cumsum(lengths) - lengths,
        action_lengths=lengths,
        action=np.append(history.action, np.tile([0, 3, 1, len(CARD.actions) - 1], count)),
        offset_s=np.append(history.offset_s, np.tile(np.float32([0, 1, 2, 77]), count)),
    )
    assert past == len(columns.action) - 2 * count
    torch.testing.assert_close(predictions(model, columns, True), predictions(model, other, True))


def test_candidates_follow_the_window_in_its_last_context() -> None:
    history = one_window(9)
    columns = append_candidates_now(history, some_items(np.array([5, 6])), CARD)
    tab, item = history.impression_ids["tab"], history.impression_ids["item_id"]
    assert columns.first_target.tolist() == [9]
    assert columns.lengths.tolist() == [11]
    assert columns.impression_ids["item_id"].tolist() == [*item, 5, 6]
    assert columns.impression_ids["tab"].tolist() == [*tab, tab[-1], tab[-1]]
    assert columns.ts_ms.tolist() == [*history.ts_ms, *[history.end_ms.max() + 1000] * 2]
    assert columns.action.tolist() == [*history.action, 0, 4, 0, 4]
    assert {name: rows.tolist() for name, rows in columns.outcome.items()} == {
        name: [*rows, 0, 0] for name, rows in history.outcome.items()
    }
    assert np.isnan(columns.objectives[9:]).all()


def test_candidates_extend_the_last_session() -> None:
    """Sessions end after a gap of 25 s; buckets have edges 2 and 4 for positions, 5, 10 and 20 s for gaps."""
    history = one_window(9)
    lasts = history.end_ms - history.ts_ms

    def session(gaps_s: list[int]) -> list[list[int]]:
        ts_ms = np.cumsum(np.array([0, *gaps_s]) * 1000)
        moved = dataclasses.replace(history, ts_ms=ts_ms, end_ms=ts_ms + np.append(lasts[:-1] % 7000, 7000))
        columns = append_candidates_now(moved, some_items(np.array([5, 6])), CARD)
        return [rows[9:].tolist() for rows in columns.session.values()]

    last = int(history.outcome["feedback"][-1])
    assert last
    # The last impression takes 7 s; the request is one second later.
    assert session([9] * 8) == [[3, 3], [2, 2], [last, last]]
    assert session([9] * 7 + [26]) == [[2, 2], [2, 2], [last, last]]
    unseen = append_candidates_now(empty_window(CARD), some_items(np.array([5, 6])), CARD)
    assert [rows.tolist() for rows in unseen.session.values()] == [[1, 1], [0, 0], [0, 0]]


def test_rank_equals_single_candidate_predictions(trained_run: TrainedRun, tmp_path: Path) -> None:
    ranking = ranked(trained_run, tmp_path / "items", "item-3\n\n  item-7 \nitem-3\nnobody knows\nitem-12\n")
    assert [ranking.user, ranking.user_known, ranking.sort_by, ranking.unknown_items] == [
        trained_run.user,
        True,
        "watch",
        1,
    ]
    assert ranking.history_length == CARD.max_history
    assert {c.item: c.known for c in ranking.candidates} == {
        "item-3": True,
        "item-7": True,
        "item-12": True,
        "nobody knows": False,
    }
    assert [c.expected_watch_s for c in ranking.candidates] == sorted(
        (c.expected_watch_s for c in ranking.candidates), reverse=True
    )
    table = pq.read_table(trained_run.data / "items.parquet").to_pydict()
    with load_run(str(trained_run.run)) as loaded:
        for candidate in ranking.candidates:
            index = table["item"].index(candidate.item) if candidate.known else None
            rows = [0, 0] if index is None else [table["item_id"][index], table["author_id"][index]]
            statistics = np.zeros(len(CARD.statistics)) if index is None else table["statistics"][index]
            _check_alone(loaded, candidate, np.array(rows), np.array([statistics], np.float16), trained_run)


def _check_alone(
    loaded: LoadedRun, candidate: ScoredCandidate, rows: np.ndarray, statistics: np.ndarray, trained_run: TrainedRun
) -> None:
    """Compare a candidate with the only target of a window in an ordinary batch."""
    window = read_latest_window(Dataset(str(trained_run.data), CARD), trained_run.user)
    ids = {"item_id": rows[:1], "author_id": rows[1:]}
    alone = CandidateItems([candidate.item], np.array([candidate.known]), ids, statistics, np.zeros((1, 0)))
    columns = append_candidates_now(window, alone, CARD)
    batch = collate(columns, np.zeros(1, np.int64), full_tables(CARD, loaded.config))
    loaded.model.model_parallel.eval()
    with torch.no_grad():
        _, (_, output) = loaded.model.model_parallel(batch)
    marginals = loaded.model.model.ranker.marginals(output, loaded.config.evaluate.max_unexplored_mass)
    expected = [*marginals.probability[0, 1:-1].tolist(), output.label_probability[0, 0].item()]
    assert list(candidate.probability) == NAMES
    np.testing.assert_allclose(list(candidate.probability.values()), expected, atol=1e-5)
    assert candidate.expected_watch_s == pytest.approx(marginals.time[0, -1].expm1().item(), rel=1e-4)
    names, seconds = zip(*candidate.timeline, strict=True)
    assert (names[0], seconds[0], names[-1]) == ("start", 0.0, "exit")
    assert 0 < candidate.timeline_probability < 1


def test_timelines_have_seconds_for_timed_actions() -> None:
    nan = float("nan")
    decoded = DecodedSequences(
        action=torch.tensor([[[2, 1, 4], [4, -1, -1]], [[4, -1, -1], [1, 4, -1]]]),
        time=torch.tensor([[[0.5, 1.0, 2.0], [1.0, nan, nan]], [[-0.1, nan, nan], [1.0, 2.0, nan]]]),
        log_probability=torch.tensor([[0.25, 0.1], [0.5, 0.2]]).log(),
    )
    (first, other), (second, _) = timelines(decoded, [2, 5], CARD)
    assert timelines(decoded, [1, 2], CARD)[0] == [first]
    start = ("start", 0.0)
    like, left = ("like", pytest.approx(np.expm1(1))), ("exit", pytest.approx(np.expm1(2)))
    assert first == ([start, ("comment", None), like, left], pytest.approx(0.25))
    assert other == ([start, ("exit", pytest.approx(np.expm1(1)))], pytest.approx(0.1))
    assert second == ([start, ("exit", 0.0)], pytest.approx(0.5))


def test_unknown_user_gets_popular_items_without_history(trained_run: TrainedRun) -> None:
    ranking = rank_run(str(trained_run.run), "nobody", sort_by="like", k=100)
    assert [ranking.user_known, ranking.history_length, ranking.sort_by, ranking.unknown_items] == [False, 0, "like", 0]
    statistics = pq.read_table(trained_run.data / "item_statistics.parquet").to_pydict()
    known_items = {f"item-{row}" for row in statistics["item_id"] if row}
    assert {candidate.item for candidate in ranking.candidates} == known_items
    likes = [candidate.probability["like"] for candidate in ranking.candidates]
    assert likes == sorted(likes, reverse=True)
    assert likes[0] > likes[-1]


def test_history_changes_the_ranking(trained_run: TrainedRun, tmp_path: Path) -> None:
    known = ranked(trained_run, tmp_path / "items", "item-3")
    unknown = ranked(trained_run, tmp_path / "items", "item-3", user="nobody")
    assert known.candidates[0].probability != unknown.candidates[0].probability


def test_returns_the_top_k(trained_run: TrainedRun) -> None:
    all_ranked, few = (
        rank_run(str(trained_run.run), trained_run.user, k=100),
        rank_run(str(trained_run.run), trained_run.user, k=3),
    )
    assert few.candidates == all_ranked.candidates[:3]
    assert few.num_candidates == len(all_ranked.candidates) > 3


def test_popular_items_have_the_most_impressions(tmp_path: Path) -> None:
    statistics = {"item_id": [0, 1, 2, 3, 4], "impressions": [99, 5, 7, 7, 1]}
    items = {"item": ["a", "b", "c", "d", "e", "f"], "item_id": [4, 3, 2, 3, 1, 0], "author_id": [1, 2, 3, 4, 5, 6]}
    items["statistics"] = [[float(number), 0.0, 1.0] for number in range(6)]
    pq.write_table(pa.table(statistics), tmp_path / "item_statistics.parquet")
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    popular = popular_items(Dataset(str(tmp_path), CARD), 4)
    assert popular.ids == ["c", "b", "d", "e"]  # b and d share a row
    assert popular.rows["author_id"].tolist() == [3, 2, 4, 5]
    assert popular.statistics[:, 0].tolist() == [2, 1, 3, 4]
    assert popular_items(Dataset(str(tmp_path), CARD), 2).ids == ["c", "b"]


def _write_user(folder: Path, user: str, starts: list[int]) -> None:
    """Write windows of other users and of ``user`` with starts ``starts`` (in 1000 s)."""
    columns = make_columns(CARD, 40, np.random.default_rng(0))
    where = np.array([3, 22, 35])[: len(starts)]
    shift = np.zeros(len(columns), np.int64)
    shift[where] = np.array(starts) * 1_000_000 - columns.ts_ms[columns.starts[where]]
    moved = columns.ts_ms + np.repeat(shift, columns.lengths)
    table = to_table(dataclasses.replace(columns, ts_ms=moved), CARD)
    users = np.array(table["user"].to_pylist(), dtype=object)
    users[where] = user
    folder.mkdir(parents=True)
    pq.write_table(
        table.set_column(table.column_names.index("user"), "user", pa.array(users)), folder / "f.parquet", 10
    )


@pytest.mark.parametrize(("last", "starts"), [("test", [500, 300]), ("valid", [200, 900, 300]), ("train", [100])])
def test_reads_the_latest_window_of_the_latest_split(tmp_path: Path, last: str, starts: list[int]) -> None:
    for split in SPLITS[: SPLITS.index(last)]:
        _write_user(tmp_path / split, "ann", [1000])
    _write_user(tmp_path / last, "ann", starts)
    for split in SPLITS[SPLITS.index(last) + 1 :]:
        _write_user(tmp_path / split, "bob", [10])
    window = read_latest_window(Dataset(str(tmp_path), CARD), "ann")
    assert window is not None
    assert window.ts_ms[0] == max(starts) * 1_000_000
    assert len(window) == 1
    assert len(window.ts_ms) == window.lengths[0]
    assert read_latest_window(Dataset(str(tmp_path), CARD), "an") is None


def test_unknown_items_have_row_zero(trained_run: TrainedRun) -> None:
    candidates = find_candidate_items(Dataset(str(trained_run.data), CARD), ["item-9", "?", "item-4"])
    assert candidates.is_known.tolist() == [True, False, True]
    assert candidates.rows["item_id"].tolist() == [9, 0, 4]
    assert candidates.rows["author_id"][1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort_by": "likes"}, "unknown sort key 'likes'; choose one of watch, like, comment, follow, click"),
        ({"run": "absent"}, "absent: directory not found"),
        ({"candidates": "absent"}, "absent: cannot be read"),
        ({"data": "absent"}, "absent: directory not found"),
    ],
)
def test_reports_invalid_settings_in_one_line(trained_run: TrainedRun, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        rank_run(**{"run": str(trained_run.run), "user": trained_run.user, **options})
    assert "\n" not in str(raised.value)
    assert not torch.distributed.is_initialized()


def test_reports_missing_candidates_in_one_line(trained_run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="items: no candidates"):
        ranked(trained_run, tmp_path / "items", " \n\n")


def _drop_column(file: Path) -> None:
    pq.write_table(pq.read_table(file).drop_columns(["author_id"]), file)


def _large_id(file: Path) -> None:
    table = pq.read_table(file)
    index = table.column_names.index("author_id")
    pq.write_table(table.set_column(index, "author_id", pa.array([9] * len(table))), file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "items.parquet: cannot be read .No such file"),
        (lambda file: file.write_bytes(b"PAR1" * 9), "items.parquet: cannot be read"),
        (_drop_column, "items.parquet: cannot be read .*author_id"),
        (_large_id, r"items.parquet, field 'author_id': id is not in \[0, 9\)"),
    ],
)
def test_reports_a_corrupted_item_table_in_one_line(
    trained_run: TrainedRun, tmp_path: Path, damage: object, message: str
) -> None:
    file = tmp_path / "items.parquet"
    file.write_bytes((trained_run.data / "items.parquet").read_bytes())
    damage(file)
    with pytest.raises(DataError, match=message) as raised:
        find_candidate_items(Dataset(str(tmp_path), CARD), ["item-1"])
    assert "\n" not in str(raised.value)


def test_without_watch_times_the_first_action_is_the_sort_key(tmp_path: Path) -> None:
    def card(**change: object) -> DatasetCard:
        return dataclasses.replace(CARD, timed_actions=["like"], **change)

    assert resolve_sort_key(CARD, "") == "watch"
    assert resolve_sort_key(card(), "") == "like"
    assert resolve_sort_key(card(actions=["start", "exit"]), "") == "click"
    with pytest.raises(UserError, match="no action, label or watch time"):
        resolve_sort_key(card(actions=["start", "exit"], labels=[]), "")
    with pytest.raises(UserError, match="unknown sort key 'watch'"):
        resolve_sort_key(card(), "watch")


# --- with an ensemble -------------------------------------------------------------------------------------------

OUTCOMES = [*NAMES, "glance", "effective"]
EVENTS = 4


class Silent:
    """Progress callback that does nothing."""

    def on_scoring(self, split: str, done: int, files: int) -> None: ...
    def on_fit_start(self, name: str) -> None: ...
    def on_epoch_end(self, name: str, epoch: EpochResult) -> None: ...


@pytest.fixture(scope="module")
def with_ensemble(trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Run with objectives and an ensemble on the same dataset."""
    run = tmp_path_factory.mktemp("with_ensemble") / "run"
    config = short_training(5, predict_objectives=True)
    config.loader.max_impressions_per_batch, config.evaluate.max_unexplored_mass = 60, 0.0
    config.optim.dense_lr, config.optim.sparse_lr = 0.05, 0.3
    train(config, str(trained_run.data), str(run))
    settings = EnsembleConfig(
        epochs=2, lr=0.05, dim=4, hidden_dims=[4], quadrature_degree=8, max_history_events=EVENTS, formula_trials=2
    )
    assert train_ensemble(str(run), str(run / "ensemble"), settings, Silent()) is not None
    return dataclasses.replace(trained_run, run=run)


def alone_score(
    loaded: LoadedRun, model: Ensemble, card: EnsembleCard, candidate: ScoredCandidate, trained_run: TrainedRun
) -> float:
    """Return the ensemble score of one candidate from the model's forward pass."""
    table = pq.read_table(trained_run.data / "items.parquet").to_pydict()
    at = table["item"].index(candidate.item)
    rows = {name: np.array([table[name][at]]) for name in ("item_id", "author_id")}
    window = read_latest_window(Dataset(str(trained_run.data), CARD), trained_run.user)
    statistics = np.array([table["statistics"][at]], np.float16)
    items = CandidateItems([candidate.item], np.ones(1, bool), rows, statistics, np.zeros((1, 0)))
    columns = append_candidates_now(window, items, CARD)
    batch = collate(columns, np.zeros(1, np.int64), full_tables(CARD, loaded.config))
    loaded.model.model_parallel.eval()
    with torch.no_grad():
        _, (_, output) = loaded.model.model_parallel(batch)
        ranker = loaded.model.model.ranker
        marginals = ranker.marginals(output, 0.0)
        heads = torch.cat([output.label_probability, output.objective_probability], 1).logit()
        value = torch.cat([marginals.probability[:, 1:-1].logit(), heads, marginals.time[:, -1:]], 1)
        looked_up = loaded.model.model.embeddings(batch.sparse)
        known_items = {
            name: looked_up[name].values()[batch.row_index[name]] for name in ("item_id", "author_id", "tab")
        }
        past = torch.cat([known_items["item_id"][:-1], ranker.encode_actions(looked_up, batch)], 1)[-EVENTS:]
        context = torch.cat([values[-1] for values in known_items.values()])
        scored = model(value[None], past[None], torch.tensor([len(past)]), context[None, None])
    assert [objective.name for objective in card.objectives] == [*OUTCOMES, "watch_time"]
    return float(scored.score)


def test_sorts_by_the_ensemble_by_default(with_ensemble: TrainedRun, tmp_path: Path) -> None:
    """Scores equal those of single candidates."""
    ranking = ranked(with_ensemble, tmp_path / "items", "\n".join(f"item-{row}" for row in range(1, 13)))
    scores = [candidate.score for candidate in ranking.candidates]
    assert ranking.sort_by == "ensemble"
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1] + 1e-3
    model, card = load_ensemble(str(with_ensemble.run / "ensemble"))
    with load_run(str(with_ensemble.run)) as loaded:
        alone = [alone_score(loaded, model, card, candidate, with_ensemble) for candidate in ranking.candidates]
    assert scores == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_contributions_sum_to_the_score(with_ensemble: TrainedRun) -> None:
    for user in (with_ensemble.user, "nobody"):
        for candidate in rank_run(str(with_ensemble.run), user, k=5).candidates:
            parts = candidate.explanation
            assert [part.objective for part in parts] == [*OUTCOMES, "watch_time"]
            assert [part.higher_is_better for part in parts] == [True] * 4 + [False, True, True]
            assert sum(part.contribution for part in parts) == pytest.approx(candidate.score, rel=1e-5, abs=1e-6)
            assert sum(part.weight for part in parts) == pytest.approx(1, rel=1e-5)
            output = {part.objective: part.prediction for part in parts if part.unit == "probability"}
            assert output == candidate.probability
            assert (parts[-1].unit, parts[-1].prediction) == ("s", candidate.expected_watch_s)


@pytest.mark.parametrize("by", ["watch", *OUTCOMES])
def test_sorts_by_outcomes_with_ensemble_scores(by: str, with_ensemble: TrainedRun) -> None:
    """Outcomes where lower is better sort ascending."""
    all_ranked = rank_run(str(with_ensemble.run), with_ensemble.user, sort_by=by, k=100)
    top = rank_run(str(with_ensemble.run), with_ensemble.user, sort_by=by, k=7)
    assert [candidate.item for candidate in top.candidates] == [
        candidate.item for candidate in all_ranked.candidates[:7]
    ]
    values = [
        candidate.expected_watch_s if by == "watch" else candidate.probability[by]
        for candidate in all_ranked.candidates
    ]
    assert values == sorted(values, reverse=by != "glance")
    assert values[0] != values[-1]
    assert np.isfinite([candidate.score for candidate in top.candidates]).all()
    assert (top.sort_by, top.ascending) == (by, by == "glance")


def test_uses_another_directory_and_rejects_another_checkpoint(
    trained_run: TrainedRun, with_ensemble: TrainedRun, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    model, card = load_ensemble(str(with_ensemble.run / "ensemble"))
    save_ensemble(str(folder), model, card)
    assert rank_run(str(with_ensemble.run), "nobody", ensemble=str(folder)) == rank_run(
        str(with_ensemble.run), "nobody"
    )
    with pytest.raises(UserError, match=r"elsewhere: ensemble was trained on .*, which has different outputs"):
        rank_run(str(trained_run.run), "nobody", ensemble=str(folder))
    save_ensemble(str(folder), model, dataclasses.replace(card, step=2))
    with pytest.raises(UserError, match=r"ensemble was trained on step 2 of .*, best checkpoint is step 5"):
        rank_run(str(with_ensemble.run), "nobody", ensemble=str(folder))
    with pytest.raises(UserError, match="cannot sort by ensemble: the run has none"):
        rank_run(str(trained_run.run), "nobody", sort_by="ensemble")


def test_prints_explanations(
    trained_run: TrainedRun, with_ensemble: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rank", "--user", "nobody", "--k", "2", "--explain", "--run"]
    main([*command, str(with_ensemble.run)])
    text = capsys.readouterr().out
    best = rank_run(str(with_ensemble.run), "nobody", k=1).candidates[0]
    assert "by ensemble score" in text
    assert "score contributions" in text
    assert f"{best.score:+.4f}" in text
    main([*command, str(with_ensemble.run), "--sort-by", "ensemble"])
    assert capsys.readouterr().out == text


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the error line of ``a2gen rank --explain``."""
    with pytest.raises(SystemExit) as left:
        main(["rank", "--user", "nobody", "--explain", *options])
    output = capsys.readouterr()
    assert left.value.code == 2
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line


def test_rejects_explanations_of_other_sort_keys(
    trained_run: TrainedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error precedes reading the run, or the dataset if there is no ensemble."""
    line = refused(capsys, "--run", "absent", "--sort-by", "watch")
    assert line.endswith("--explain requires --sort-by ensemble, not watch")
    monkeypatch.setattr(run_ranking, "popular_items", lambda *_: pytest.fail("too late"))
    line = refused(capsys, "--run", str(trained_run.run))
    assert line.endswith("cannot sort by ensemble: the run has none; train one with `a2gen ensemble train`")
