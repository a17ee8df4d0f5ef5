"""Scored session lists against loops over lists and candidates, with one window per candidate."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns, concat_ranges
from a2gen_rec.data.schema import FeedbackRule
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.ensemble import score_lists
from a2gen_rec.ensemble.session_lists import SessionLists
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.models.scoring import TargetPredictions, prediction_objectives, recent_events
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import build_training_model
from a2gen_rec.training.entrypoint import train
from a2gen_rec.training.loaded_run import LoadedRun, load_run, restore_config
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.cards import full_tables, make_card, short_training, write_dataset
from tests.helpers.distributed import on_ranks

pytestmark = pytest.mark.training

CARD = make_card()
BEHAVIORS = ("like", "comment", "follow", "click", "effective")
EVENTS = 4


@dataclass(frozen=True)
class TrainedRun:
    data: Path
    run: Path


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A trained run; one file of its dataset has a single row group."""
    folder = tmp_path_factory.mktemp("scores")
    data, run = write_dataset(folder / "data", CARD, windows=24, files=2), folder / "run"
    single = data / "valid" / "part-00001.parquet"
    pq.write_table(pq.read_table(single), single)
    config = short_training(6, feedback_encoding="dual_view", session_features=True, predict_objectives=True)
    config.optim.dense_lr, config.optim.sparse_lr = 0.05, 0.3
    config.loader.max_impressions_per_batch, config.evaluate.max_unexplored_mass = 60, 0.0
    train(config, str(data), str(run))
    return TrainedRun(data, run)


@pytest.fixture(scope="module")
def loaded(trained_run: TrainedRun) -> Iterator[LoadedRun]:
    with load_run(str(trained_run.run)) as loaded:
        yield loaded


CONTEXT = [feature.name for feature in CARD.features_at("context")]


def split_columns(trained_run: TrainedRun, split: str = "valid") -> WindowColumns:
    return read_columns(read_row_groups([str(file) for file in sorted((trained_run.data / split).iterdir())]), CARD)


def requests(columns: WindowColumns, gap_s: float) -> Iterator[tuple[int, list[int]]]:
    """Yield window and targets of each list."""
    for window in range(len(columns)):
        start = int(columns.starts[window])
        members: list[int] = []
        for position in range(start + int(columns.first_target[window]), start + int(columns.lengths[window])):
            if members and columns.ts_ms[position] - columns.ts_ms[position - 1] > 1000 * gap_s:
                yield window, members
                members = []
            members.append(position)
        yield window, members


def alone(columns: WindowColumns, window: int, first: int, target: int) -> WindowColumns:
    """Return one window: impressions before ``first``, then ``target`` renamed to the query time."""
    flat = np.append(np.arange(columns.starts[window], first), target)
    lengths = columns.action_lengths[flat]
    tokens = concat_ranges(columns.action_starts[flat], lengths)

    def at_query_time(rows: np.ndarray) -> np.ndarray:
        return np.append(rows[flat[:-1]], rows[first])

    target_row = columns.target_starts[window] + target - columns.starts[window] - columns.first_target[window]
    return WindowColumns(
        user_key=columns.user_key[[window]],
        first_target=np.array([len(flat) - 1]),
        starts=np.zeros(1, np.int64),
        lengths=np.array([len(flat)]),
        user_ids={name: rows[[window]] for name, rows in columns.user_ids.items()},
        impression_ids={
            name: at_query_time(rows) if name in CONTEXT else rows[flat]
            for name, rows in columns.impression_ids.items()
        },
        session={name: at_query_time(rows) for name, rows in columns.session.items()},
        outcome={name: rows[flat] for name, rows in columns.outcome.items()},
        ts_ms=at_query_time(columns.ts_ms),
        end_ms=columns.end_ms[flat],
        labels=columns.labels[flat],
        objectives=columns.objectives[flat],
        oracle=columns.oracle[flat],
        action_starts=np.cumsum(lengths) - lengths,
        action_lengths=lengths,
        action=columns.action[tokens],
        offset_s=columns.offset_s[tokens],
        target_starts=np.zeros(1, np.int64),
        statistics=columns.statistics[target_row][None],
        user_numbers=columns.user_numbers[[window]],
        numbers=columns.numbers[flat],
        item_index=columns.item_index[flat],
    )


def predict_alone(loaded: LoadedRun, columns: WindowColumns) -> tuple[np.ndarray, WindowBatch]:
    """Return predictions of a window's only target from the model's forward pass."""
    batch = collate(columns, np.zeros(1, np.int64), full_tables(CARD, loaded.config))
    loaded.model.model_parallel.eval()
    with torch.no_grad():
        _, (_, output) = loaded.model.model_parallel(batch)
        marginals = loaded.model.model.ranker.marginals(output, 0.0)
    heads = torch.cat([output.label_probability, output.objective_probability], 1).logit()
    return torch.cat([marginals.probability[:, 1:-1].logit(), heads, marginals.time[:, -1:]], 1)[0].numpy(), batch


@torch.no_grad()
def embed(loaded: LoadedRun, batch: WindowBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the context of the last impression, and [earlier impressions, 2·dim] item and action embeddings."""
    rows = loaded.model.model.embeddings(batch.sparse)
    embeddings = {name: rows[name].values()[batch.row_index[name]] for name in ("item_id", "author_id", "tab")}
    actions = loaded.model.model.ranker.encode_actions(rows, batch)
    return torch.cat([values[-1] for values in embeddings.values()]).numpy(), torch.cat(
        [embeddings["item_id"][:-1], actions], 1
    ).numpy()


def observed_labels(columns: WindowColumns, position: int) -> list[float]:
    codes = columns.action[columns.action_starts[position] :][: columns.action_lengths[position]]
    events = [float(CARD.actions.index(name) in codes) for name in BEHAVIORS[:3]]
    return [*events, float(columns.labels[position, 0]), float(columns.objectives[position, 1])]


def slices(lists: SessionLists) -> Iterator[tuple[slice, slice]]:
    """Yield slices of candidates and events of each list."""
    candidate, event = np.cumsum([0, *lists.length]), np.cumsum([0, *lists.events_length])
    for row in range(len(lists)):
        yield slice(candidate[row], candidate[row + 1]), slice(event[row], event[row + 1])


def same(one: SessionLists, other: SessionLists, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert equality up to rounding of model outputs."""
    for field in fields(SessionLists):
        values = [getattr(lists, field.name) for lists in (one, other)]
        if field.name in ("predictions", "context", "events"):
            np.testing.assert_allclose(*values, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("gap_s", [0.0, 12.0, FULL_WINDOW])
def test_lists_equal_single_candidate_predictions(
    gap_s: float, trained_run: TrainedRun, loaded: LoadedRun, tmp_path: Path
) -> None:
    lists = score_lists.score_session_lists(loaded, "valid", str(tmp_path), EVENTS, gap_s)
    assert lists is not None
    assert lists.objectives == ("like", "comment", "follow", "click", "glance", "effective", "watch_time")
    assert lists.behaviors == BEHAVIORS
    columns = split_columns(trained_run)
    rows = {(int(user), int(ts)): row for row, (user, ts) in enumerate(zip(lists.user, lists.ts_ms, strict=True))}
    parts = list(slices(lists))
    numbers = {"long": 0, "no event": 0, "unended": 0}
    expected = list(requests(columns, gap_s))
    assert len(expected) == len(lists) == len(rows)
    for window, members in expected:
        first, now = members[0], columns.ts_ms[members[0]]
        row = rows[int(columns.user_key[window]), int(now)]
        candidates, events = parts[row]
        assert lists.item[candidates].tolist() == columns.impression_ids["item_id"][members].tolist()
        for position, target in enumerate(members):
            value, batch = predict_alone(loaded, alone(columns, window, first, target))
            context, past = embed(loaded, batch)
            np.testing.assert_allclose(lists.predictions[candidates][position], value, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(lists.context[candidates][position], context, rtol=1e-3, atol=1e-3)
            assert lists.label[candidates][position].tolist() == pytest.approx(
                observed_labels(columns, target), nan_ok=True
            )
        before = range(int(columns.starts[window]), first)
        ended = [
            index - before.start for index in before if columns.end_ms[index] <= now and columns.ts_ms[index] < now
        ]
        recent = [index for index in ended if index >= len(before) - EVENTS]
        np.testing.assert_allclose(lists.events[events], past[recent], rtol=1e-3, atol=1e-3)
        numbers["long"] += len(members) > 1
        numbers["no event"] += not recent
        numbers["unended"] += len(recent) < min(len(before), EVENTS)
    assert numbers["no event"] > 3
    assert numbers["unended"] > 3
    assert (numbers["long"] > 3) is (gap_s > 0)
    assert lists.predictions.std(0).min() > 1e-3, "predictions must differ for a meaningful comparison"


def test_events_at_the_query_time_are_excluded(trained_run: TrainedRun, loaded: LoadedRun) -> None:
    """Events that end later are excluded; events that end at the query time are included."""
    columns = split_columns(trained_run)
    window = int(np.flatnonzero(columns.first_target >= 3)[0])
    start = int(columns.starts[window])
    first = start + int(columns.first_target[window])
    now = columns.ts_ms[first]
    ts_ms, end_ms = columns.ts_ms.copy(), columns.end_ms.copy()
    ts_ms[first - 1] = end_ms[first - 1] = now
    end_ms[first - 2], end_ms[first - 3] = now + 1, now
    moved = replace(columns, ts_ms=ts_ms, end_ms=end_ms)
    batch = collate(moved, np.array([window]), full_tables(CARD, loaded.config), request_gap_s=FULL_WINDOW)
    for max_events, expected in ((0, []), (2, []), (3, [first - 3 - start])):
        key, length = recent_events(batch, torch.tensor([0]), max_events)
        assert batch.history_index[key].tolist() == expected
        assert length.tolist() == [len(expected)]


def test_directions_of_objectives() -> None:
    card = replace(
        CARD,
        objectives=["glance", "effective", "negative"],
        feedback=FeedbackRule(3.0, ["comment"], "length", [10.0], [9.0, 5.0, 12.0]),
        negative_actions=["comment"],
    )
    lower_is_better = {"glance", "negative", "comment"}
    objectives = prediction_objectives(card, ("glance", "effective", "negative", "watch_time"))
    assert [objective.name for objective in objectives] == [
        *("like", "comment", "follow", "click", "glance", "effective", "negative", "watch_time")
    ], "order of a run's predictions, with a single watch time"
    assert {objective.name for objective in objectives if not objective.higher_is_better} == lower_is_better
    assert not lower_is_better & set(score_lists.behavior_names(card)), "negative outcomes are not behaviors"
    untimed = replace(CARD, timed_actions=["like"], feedback=None, objectives=[])
    assert [objective.name for objective in prediction_objectives(untimed, ())] == [
        "like",
        "comment",
        "follow",
        "click",
    ]
    assert score_lists.behavior_names(untimed) == ("like", "comment", "follow", "click")
    disliked = replace(untimed, negative_actions=["follow"])
    assert [objective.name for objective in prediction_objectives(disliked, ()) if not objective.higher_is_better] == [
        "follow"
    ]
    assert score_lists.behavior_names(disliked) == ("like", "comment", "click"), "also without watch times"


def test_certain_outcomes_have_finite_logits() -> None:
    """Sums of float32 probabilities may exceed 1."""
    probability = torch.tensor([[0.0, 1.0, 1 + 1e-6, 0.5, 1e-3]])
    predictions = TargetPredictions(None, probability, torch.tensor([[2.0]]), None, None, None)  # type: ignore[arg-type]
    value = predictions.ensemble_inputs(with_watch_time=True)[0].tolist()
    assert value[:3] == pytest.approx([-16.118, 16.118, 16.118], abs=1e-3)
    assert value[3:] == pytest.approx([0.0, np.log(1e-3 / 0.999), 2.0])
    assert predictions.ensemble_inputs(with_watch_time=False).shape == (1, 5)


def _scored(process: DistributedContext, trained_run: TrainedRun, folder: Path) -> SessionLists | None:
    state = checkpoint.TrainState.read(position := checkpoint.best(str(trained_run.run)))
    config = restore_config(state.config)
    built = build_training_model(CARD, config, process)
    checkpoint.load(position, built, with_optimizer=False)
    loaded = LoadedRun(built, config, CARD, state.data, process, state.step, checkpoint.fingerprint(position))
    return score_lists.score_session_lists(loaded, "valid", str(folder), EVENTS, 12.0)


def test_two_ranks_equal_one_rank(trained_run: TrainedRun, loaded: LoadedRun, tmp_path: Path) -> None:
    """A file with a single row group leaves one rank without data."""
    one = score_lists.score_session_lists(loaded, "valid", str(tmp_path / "one"), EVENTS, 12.0)
    first, second = on_ranks(2, tmp_path, _scored, trained_run, tmp_path / "two")
    assert second is None, "only rank 0 gets the lists"
    same(first, one, rtol=1e-3, atol=1e-3)


def test_scoring_resumes_after_interruption(
    trained_run: TrainedRun, loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while renaming the second file: only that file is scored again."""
    full_lists = score_lists.score_session_lists(loaded, "valid", str(tmp_path / "whole"), EVENTS, 12.0)
    folder, renamed, scored_files = tmp_path / "interrupted", [], []

    def interrupted(source: str, target: str) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        Path(source).rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(paths.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score_lists.score_session_lists(loaded, "valid", str(folder), EVENTS, 12.0)
    assert [path.name for path in folder.iterdir()] == ["part-00000.parquet"]
    (folder / "part-00001.parquet.0123abcd.writing").write_bytes(b"of a killed process")
    score_file = score_lists._score_file
    monkeypatch.setattr(score_lists, "_score_file", lambda *args: scored_files.append(args[2]) or score_file(*args))
    progress: list[tuple[int, int]] = []
    again = score_lists.score_session_lists(
        loaded, "valid", str(folder), EVENTS, 12.0, lambda *counts: progress.append(counts)
    )
    assert [Path(file).name for file in scored_files] == ["part-00001.parquet"]
    assert progress == [(0, 2), (1, 2), (2, 2)]
    same(again, full_lists)
    score_lists.score_session_lists(loaded, "valid", str(folder), EVENTS, 12.0)
    assert len(scored_files) == 1, "all files are cached"


def test_reports_corrupted_scores_and_missing_windows(
    trained_run: TrainedRun, loaded: LoadedRun, tmp_path: Path
) -> None:
    score_lists.score_session_lists(loaded, "valid", str(tmp_path / "scores"), EVENTS, 12.0)
    file = tmp_path / "scores" / "part-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"part-00001.parquet: cannot be read") as caught:
        score_lists.score_session_lists(loaded, "valid", str(tmp_path / "scores"), EVENTS, 12.0)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty" / "valid").mkdir(parents=True)
    with pytest.raises(UserError, match="split 'valid' has no windows"):
        score_lists.score_session_lists(
            replace(loaded, data=str(tmp_path / "empty")), "valid", str(tmp_path / "x"), EVENTS, 12.0
        )
