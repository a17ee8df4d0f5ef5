"""Observed sequences against the columns they come from; generated ones against the tree of all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a2gen_rec.cli.main import main
from a2gen_rec.config import EvaluateConfig
from a2gen_rec.data.batch import collate
from a2gen_rec.evaluation import sequences
from a2gen_rec.evaluation.sequences import observed_sequences
from a2gen_rec.runs.evaluate import evaluate_run
from a2gen_rec.training.entrypoint import train
from tests.helpers.cards import make_card, make_columns, small_config, write_dataset

CARD = make_card()  # three actions beside start and exit: 16 sequences, as many as there are beams
ALL = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("sequences") / "data", CARD, windows=80, files=1)


def trained(data: Path, run: Path, **model: object) -> Path:
    config = small_config(**model)
    config.train.max_steps, config.loader.prefetch, config.optim.dense_lr = 4, False, 0.05
    config.loader.max_impressions_per_batch = 60
    train(config, str(data), str(run))
    return run


def measured(run: Path, most: int) -> dict[str, Any]:
    return evaluate_run(str(run), "test", "", EvaluateConfig(max_unexplored_mass=0.0, num_top_sequences=most))


def test_observed_sequences_are_those_of_the_columns() -> None:
    columns = make_columns(CARD, 9, np.random.default_rng(0))
    batch = collate(columns, np.arange(9), {})
    wanted = []
    for window in range(9):
        for place in range(columns.first_target[window], columns.lengths[window]):
            impression = columns.starts[window] + place
            begin = columns.action_starts[impression]
            wanted.append(columns.action[begin + 1 : begin + columns.action_lengths[impression]].tolist())
    found = [[code for code in row if code >= 0] for row in observed_sequences(batch).tolist()]
    assert found == wanted
    unordered = [[code for code in row if code >= 0] for row in observed_sequences(batch, in_order=False).tolist()]
    assert unordered == [sorted(row) for row in wanted]


def test_what_is_expected_adds_up_to_the_probabilities_of_actions(data: Path, tmp_path: Path) -> None:
    """The tree of prefixes, expanded to its end, is the oracle of the beams."""
    result = measured(trained(data, tmp_path / "run", occurrence_head=False), ALL)
    found = result["sequences"]
    assert found["targets"] == result["targets"]
    assert found["stride"] == 1
    assert found["covered_mass"] == pytest.approx(1, abs=1e-5)
    rows = found["most_frequent"]
    assert len(rows) == found["distinct"]["observed"] == ALL, "of so many random impressions, all are observed"
    assert sum(row["observed"] for row in rows) == pytest.approx(1)
    assert [row["observed"] for row in rows] == sorted((row["observed"] for row in rows), reverse=True)
    for name, of in result["actions"].items():
        if name in CARD.labels:
            continue
        has = [row for row in rows if name in row["actions"]]
        assert sum(row["observed"] for row in has) * result["targets"] == pytest.approx(of["positives"])
        said = of["calibration"] * of["positives"] / result["targets"]
        assert sum(row["expected"] for row in has) == pytest.approx(said, rel=1e-3)


def test_of_many_targets_evenly_spaced_ones_are_decoded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(data, tmp_path / "run")
    whole = measured(run, ALL)
    monkeypatch.setattr(sequences, "MAX_DECODED_TARGETS", 20)

    def total(
        self: sequences.SequenceEvaluator, ranker: Any, total: int
    ) -> None:  # the test's card does not know its targets
        init(self, ranker, whole["targets"])

    init = sequences.SequenceEvaluator.__init__
    monkeypatch.setattr(sequences.SequenceEvaluator, "__init__", total)
    found = measured(run, 3)["sequences"]
    every = round(whole["targets"] / 20)
    assert found["stride"] == every > 1
    assert found["targets"] == -(-whole["targets"] // every), "over all batches, not from each one's first"
    assert len(found["most_frequent"]) == 3


def test_without_order_sequences_are_in_the_vocabularys(data: Path, tmp_path: Path) -> None:
    run = trained(data, tmp_path / "run", use_action_order=False)
    rows = measured(run, ALL)["sequences"]["most_frequent"]
    codes = [[CARD.actions.index(name) for name in row["actions"]] for row in rows]
    assert codes == [sorted(each) for each in codes]
    assert len(rows) == 8


def test_models_that_generate_nothing_leave_it_out(data: Path, tmp_path: Path) -> None:
    assert "sequences" not in measured(trained(data, tmp_path / "run", name="mmoe"), 5)


def test_it_is_asked_for_by_the_command(data: Path, tmp_path: Path) -> None:
    run = trained(data, tmp_path / "run", generator="implicit")
    file = tmp_path / "test.json"
    main(["evaluate", "--run", str(run), "--json", str(file), "--num-top-sequences", "2"])
    found = json.loads(file.read_text())["sequences"]
    assert len(found["most_frequent"]) == 2
    assert 0 < found["covered_mass"] <= 1 + 1e-5
    main(["evaluate", "--run", str(run), "--json", str(file)])
    assert "sequences" not in json.loads(file.read_text())


def test_distinct_sequences_sum_their_weights() -> None:
    codes = torch.tensor([[1, 4, -1], [4, -1, -1], [1, 4, -1], [2, 1, 4]])
    found = {key: (count, mass) for key, count, mass in sequences._distinct(codes, torch.tensor([0.5, 1.0, 0.25, 2.0]))}
    assert found == {(1, 4): (2, 0.75), (4,): (1, 1.0), (2, 1, 4): (1, 2.0)}
