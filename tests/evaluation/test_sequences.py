"""Observed sequences against the input columns; generated sequences against the full prefix tree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a2gen_rec.cli.main import main
from a2gen_rec.config import EvaluateConfig
from a2gen_rec.data.collate import collate
from a2gen_rec.evaluation import sequences
from a2gen_rec.evaluation.sequences import observed_sequences
from a2gen_rec.runs.evaluate import evaluate_run
from a2gen_rec.training.entrypoint import train
from tests.helpers.cards import make_card, make_columns, small_config, write_dataset

pytestmark = pytest.mark.training

CARD = make_card()  # three actions besides start and exit: 16 sequences, the number of beams
ALL = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("sequences") / "data", CARD, windows=80, files=1)


def train_run(data: Path, run: Path, **model: object) -> Path:
    config = small_config(**model)
    config.train.max_steps, config.loader.prefetch, config.optim.dense_lr = 4, False, 0.05
    config.loader.max_impressions_per_batch = 60
    train(config, str(data), str(run))
    return run


def evaluate_sequences(run: Path, k: int) -> dict[str, Any]:
    return evaluate_run(str(run), "test", "", EvaluateConfig(max_unexplored_mass=0.0, num_top_sequences=k))


def test_observed_sequences_equal_the_columns() -> None:
    columns = make_columns(CARD, 9, np.random.default_rng(0))
    batch = collate(columns, np.arange(9), {})
    expected_sequences = []
    for window in range(9):
        for position in range(columns.first_target[window], columns.lengths[window]):
            impression = columns.starts[window] + position
            start = columns.action_starts[impression]
            expected_sequences.append(columns.action[start + 1 : start + columns.action_lengths[impression]].tolist())
    report = [[code for code in row if code >= 0] for row in observed_sequences(batch).tolist()]
    assert report == expected_sequences
    unordered = [[code for code in row if code >= 0] for row in observed_sequences(batch, in_order=False).tolist()]
    assert unordered == [sorted(row) for row in expected_sequences]


def test_expected_frequencies_sum_to_action_probabilities(data: Path, tmp_path: Path) -> None:
    """Reference: the fully expanded prefix tree."""
    result = evaluate_sequences(train_run(data, tmp_path / "run", occurrence_head=False, wide_dim=0), ALL)
    report = result["sequences"]
    assert report["targets"] == result["targets"]
    assert report["stride"] == 1
    assert report["covered_mass"] == pytest.approx(1, abs=1e-5)
    rows = report["most_frequent"]
    assert len(rows) == report["distinct"]["observed"] == ALL, "all sequences occur in this many random impressions"
    assert sum(row["observed"] for row in rows) == pytest.approx(1)
    assert [row["observed"] for row in rows] == sorted((row["observed"] for row in rows), reverse=True)
    for name, metrics in result["actions"].items():
        if name in CARD.labels:
            continue
        has = [row for row in rows if name in row["actions"]]
        assert sum(row["observed"] for row in has) * result["targets"] == pytest.approx(metrics["positives"])
        predicted = metrics["calibration"] * metrics["positives"] / result["targets"]
        assert sum(row["expected"] for row in has) == pytest.approx(predicted, rel=1e-3)


def test_decodes_evenly_spaced_targets(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_run(data, tmp_path / "run")
    full = evaluate_sequences(run, ALL)
    monkeypatch.setattr(sequences, "MAX_DECODED_TARGETS", 20)

    def total(
        self: sequences.SequenceEvaluator, ranker: Any, total: int
    ) -> None:  # the card of the test has no target count
        init(self, ranker, full["targets"])

    init = sequences.SequenceEvaluator.__init__
    monkeypatch.setattr(sequences.SequenceEvaluator, "__init__", total)
    report = evaluate_sequences(run, 3)["sequences"]
    every = round(full["targets"] / 20)
    assert report["stride"] == every > 1
    assert report["targets"] == -(-full["targets"] // every), "spacing continues across batches"
    assert len(report["most_frequent"]) == 3


def test_without_action_order_sequences_are_sorted_by_code(data: Path, tmp_path: Path) -> None:
    run = train_run(data, tmp_path / "run", use_action_order=False)
    rows = evaluate_sequences(run, ALL)["sequences"]["most_frequent"]
    codes = [[CARD.actions.index(name) for name in row["actions"]] for row in rows]
    assert codes == [sorted(row) for row in codes]
    assert len(rows) == 8


def test_baselines_have_no_sequences(data: Path, tmp_path: Path) -> None:
    assert "sequences" not in evaluate_sequences(train_run(data, tmp_path / "run", name="mmoe"), 5)


def test_command_line_option_enables_sequences(data: Path, tmp_path: Path) -> None:
    run = train_run(data, tmp_path / "run", generator="implicit")
    file = tmp_path / "test.json"
    main(["evaluate", "--run", str(run), "--json", str(file), "--num-top-sequences", "2"])
    report = json.loads(file.read_text())["sequences"]
    assert len(report["most_frequent"]) == 2
    assert 0 < report["covered_mass"] <= 1 + 1e-5
    main(["evaluate", "--run", str(run), "--json", str(file)])
    assert "sequences" not in json.loads(file.read_text())


def test_weights_of_equal_sequences_are_summed() -> None:
    codes = torch.tensor([[1, 4, -1], [4, -1, -1], [1, 4, -1], [2, 1, 4]])
    report = {
        key: (count, mass) for key, count, mass in sequences._distinct(codes, torch.tensor([0.5, 1.0, 0.25, 2.0]))
    }
    assert report == {(1, 4): (2, 0.75), (4,): (1, 1.0), (2, 1, 4): (1, 2.0)}
