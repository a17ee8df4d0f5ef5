"""Round trip of predictions, and metrics computed from the file."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.evaluation.evaluate import action_metrics
from a2gen_rec.evaluation.predict import Predictions, outcome_columns
from a2gen_rec.evaluation.prediction_file import read_predictions, write_predictions
from a2gen_rec.training.entrypoint import train
from tests.helpers.cards import make_card, small_config, write_dataset

pytestmark = pytest.mark.training

CARD = make_card()


def make_predictions(oracle: list[str]) -> Predictions:
    rng = np.random.default_rng(0)
    outcomes = len(outcome_columns(CARD))

    def values(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < 0.2, np.nan, rng.random(shape)).astype(np.float32)

    return Predictions(
        user=rng.integers(-(2**62), 2**62, 9),
        ts_ms=rng.integers(0, 2**45, 9),
        user_row=rng.integers(0, 9, 9),
        item=rng.integers(0, 40, 9),
        duration_bucket=rng.integers(0, 4, 9),
        probability=values(9, outcomes),
        occurred=values(9, outcomes),
        time=values(9, len(CARD.actions) - 1),
        observed_time=values(9, len(CARD.actions) - 1),
        time_given_prefix=values(9, len(CARD.actions) - 1),
        watch_time=values(9),
        oracle=values(9, len(oracle)),
        unexplored_mass=values(9),
    )


@pytest.mark.parametrize("oracle", [[], ["like", "click"]])
def test_write_and_read_round_trip(oracle: list[str], tmp_path: Path) -> None:
    card, file = replace(CARD, oracle_columns=oracle), tmp_path / "test.parquet"
    before = make_predictions(oracle)
    write_predictions(str(file), before, card)
    after, names = read_predictions(str(file))
    assert names == [*CARD.actions[1:], *CARD.labels, *CARD.objectives]
    for field in fields(Predictions):
        left, right = getattr(before, field.name), getattr(after, field.name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert list(tmp_path.iterdir()) == [file]
    table = pq.read_table(file)
    np.testing.assert_array_equal(table["probability_click"].to_numpy(), before.probability[:, names.index("click")])
    np.testing.assert_array_equal(table["observed_time_exit"].to_numpy(), before.observed_time[:, 3])


def test_rejects_other_and_missing_files(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"user": [1]}), other)
    with pytest.raises(DataError, match="not a prediction file"):
        read_predictions(str(other))
    older = tmp_path / "older.parquet"
    write_predictions(str(older), make_predictions([]), CARD)
    pq.write_table(pq.read_table(older).drop_columns(["time_given_prefix_like"]), older)
    with pytest.raises(DataError, match=r"time_given_prefix_like.* column is missing"):
        read_predictions(str(older))
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(str(tmp_path / "nothing.parquet"))
    with pytest.raises(UserError, match="cannot be written"):
        write_predictions(str(tmp_path / "no" / "folder.parquet"), make_predictions([]), CARD)


@pytest.mark.parametrize(
    "model", [{}, {"generator": "independent_heads", "predict_objectives": True, "wide_dim": 0}, {"name": "mmoe"}]
)
def test_evaluation_is_reproducible_from_the_file(model: dict, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", CARD, windows=20)
    config = small_config(**model)
    config.train.max_steps = 2
    config.loss.time_loss = "mae"
    train(config, str(data), str(tmp_path / "run"))
    result, file = tmp_path / "result.json", tmp_path / "new" / "valid.parquet"
    command = ["evaluate", "--run", str(tmp_path / "run"), "--split", "valid"]
    main([*command, "--json", str(result), "--predictions", str(file)])
    measured = json.loads(result.read_text())
    predictions, _ = read_predictions(str(file))
    assert len(predictions.user) == measured["targets"]
    assert action_metrics(predictions, predictions.probability, CARD) == measured["actions"]
    # The loss is over the same steps, given the preceding steps.
    errors = np.abs(predictions.time_given_prefix - predictions.observed_time)
    assert np.nanmean(errors) == pytest.approx(measured["loss"]["time"], rel=1e-5)
    maes = [(row["mae_log"], row["count"]) for row in measured["time_given_prefix"].values()]
    assert sum(mae * count for mae, count in maes) / sum(count for _, count in maes) == pytest.approx(
        np.nanmean(errors), rel=1e-5
    )
    reads_steps = not model
    assert (np.nan_to_num(predictions.time_given_prefix - predictions.time) != 0).any() == reads_steps
