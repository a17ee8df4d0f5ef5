"""Comparison of models against a direct computation per run and user."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from a2gen_rec.errors import DataError, UserError
from a2gen_rec.evaluation.metrics import auc
from a2gen_rec.evaluation.prediction_file import read_predictions, write_predictions
from a2gen_rec.experiments.bootstrap import resample_weights
from a2gen_rec.experiments.comparison import Comparison, compare
from a2gen_rec.experiments.differences import MeanStd, mean_std
from a2gen_rec.experiments.resampling import AveragedOutcomes
from a2gen_rec.experiments.results import read_experiment
from a2gen_rec.reporting.pages.experiment.tables import dataset_tables
from tests.helpers.experiments import CARD, make_predictions, plain_card, write_experiment

EMPTY = {
    "suite": {"models": [], "datasets": []},
    "machine": {},
    "best_settings": {},
    "trials": [],
    "runs": [],
    "failed": [],
}
ROWS = ["like", "comment", "follow", "click"]  # actions and label, in the order of the card


def compared(folder: Path, resamples: int = 60, dataset: str = "one") -> Comparison:
    return compare(read_experiment(str(folder)), dataset, resamples)


def test_means_and_deviations_are_over_seeds(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3}, seeds=(0, 1, 2))
    results, comparison = read_experiment(str(folder)), compared(folder)
    for model in comparison.models:
        tests = [run.test for run in results.runs_of("one", model.name)]
        assert model.seeds == (0, 1, 2)
        for name in [*ROWS, "glance", "effective"]:
            for metric in ("auc", "gauc", "ne", "calibration"):
                values = [{**test["objectives"], **test["actions"]}[name][metric] for test in tests]
                assert model.outcomes[name][metric] == MeanStd(
                    pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1))
                )
        means = [np.mean([test["actions"][name]["auc"] for name in comparison.averaged.outcomes]) for test in tests]
        assert model.auc == MeanStd(pytest.approx(np.mean(means)), pytest.approx(np.std(means, ddof=1)))
        seconds = [np.mean([test["time"][name]["mae_s"] for name in comparison.averaged.times]) for test in tests]
        assert model.mae_s is not None
        assert model.mae_s.mean == pytest.approx(np.mean(seconds))
        assert model.times_given_prefix["follow"]["mae_log"] == MeanStd(0.25, 0.0)
    assert comparison.scored == [*ROWS, "glance", "effective"]
    assert comparison.positives["like"] == results.runs[0].test["actions"]["like"]["positives"]
    assert list(comparison.timed) == ["like", "follow", "exit"]
    assert [row.name for row in comparison.references] == ["item's rate in training", "median time in training"]
    assert comparison.references[0].auc == MeanStd(pytest.approx(0.55), None)
    assert comparison.references[1].mae_log == MeanStd(pytest.approx(0.9), None)


def test_means_exclude_rare_outcomes_and_times() -> None:
    actions = {"like": {"positives": 100}, "hate": {"positives": 99}, "click": {"positives": 901}}
    time = {"like": {"count": 100}, "hate": {"count": 99}, "exit": {"count": 1000}}
    test = {"targets": 1000, "actions": actions, "time": time}
    assert AveragedOutcomes.from_test(test) == (["like"], ["like", "exit"], ["hate", "click"])
    few = {name: {"positives": 3} for name in actions}
    assert AveragedOutcomes.from_test(test | {"actions": few}) == (list(actions), ["like", "exit"], []), (
        "no outcome has enough samples"
    )


def test_speed_is_the_maximum_and_excludes_time_of_resumed_runs(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3}, seeds=(0, 1, 2))
    file = folder / "results.json"
    results = json.loads(file.read_text())
    results["runs"][1]["resumed"] = True
    for run in results["runs"][3:]:
        run["resumed"] = True
    file.write_text(json.dumps(results))
    assert [(model.targets_per_s, model.seconds) for model in compared(folder).models] == [(300.0, 4.0), (600.0, None)]


def test_differences_use_the_same_resampled_users(tmp_path: Path) -> None:
    """Reference: rows of every drawn user, repeated per draw; AUC; mean over actions."""
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3})
    results, comparison = read_experiment(str(folder)), compared(folder, resamples=30)
    weights = resample_weights(comparison.users, 30)
    drawn_auc, drawn_mae = np.zeros((2, 30)), np.zeros((2, 30))
    for index, name in enumerate(("a2gen", "mmoe")):
        for run in results.runs_of("one", name):
            predictions, names = read_predictions(run.predictions)
            users = sorted(set(predictions.user.tolist()))
            for column in range(30):
                drawn = zip(users, weights[:, column].astype(int), strict=True)
                rows = np.concatenate([np.flatnonzero(predictions.user == user) for user, n in drawn for _ in range(n)])
                aucs = [
                    auc(predictions.probability[rows, names.index(name)], predictions.occurred[rows, names.index(name)])
                    for name in comparison.averaged.outcomes
                ]
                drawn_auc[index, column] += np.mean([value for value in aucs if value is not None])
                errors = [
                    np.abs(
                        predictions.time[rows, names.index(name)] - predictions.observed_time[rows, names.index(name)]
                    )
                    for name in comparison.averaged.times
                ]
                drawn_mae[index, column] += np.mean([np.nanmean(error) for error in errors])
    for index, model in enumerate(comparison.models):
        assert model.auc_interval == pytest.approx(tuple(np.quantile(drawn_auc[index], [0.025, 0.975])))
        assert model.mae_interval == pytest.approx(tuple(np.quantile(drawn_mae[index], [0.025, 0.975])), rel=1e-5)
    first, other = comparison.models
    assert first.auc_difference is first.mae_difference is None
    assert other.auc_difference is not None
    around = (other.auc_difference.low, other.auc_difference.high)
    assert around == pytest.approx(tuple(np.quantile(drawn_auc[1] - drawn_auc[0], [0.025, 0.975])))
    assert first.auc is not None
    assert other.auc is not None
    assert other.auc_difference.value == pytest.approx(other.auc.mean - first.auc.mean)
    assert other.auc_difference.significant
    assert other.auc_difference.value < 0


def test_resamples_exclude_actions_without_positives(tmp_path: Path) -> None:
    """A single user has a like; resamples without that user average the other actions."""
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3})
    for run in read_experiment(str(folder)).runs:
        predictions, _ = read_predictions(run.predictions)
        predictions.occurred[:, 0] = 0
        predictions.occurred[np.flatnonzero(predictions.user == predictions.user.min())[0], 0] = 1
        write_predictions(run.predictions, predictions, CARD)
    assert (resample_weights(40, 60)[0] == 0).any()
    for model in compared(folder).models:
        assert model.auc_interval is not None
        assert np.isfinite(model.auc_interval).all()


@pytest.mark.parametrize(("users", "testable"), [(2, False), (5, False), (19, False), (20, True), (40, True)])
def test_no_test_of_differences_over_few_users(users: int, testable: bool, tmp_path: Path) -> None:
    comparison = compared(write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3}, {"plain": 0.1}, users=users))
    assert comparison.users == users
    _, *others = comparison.models
    for model in others:
        for difference in (model.auc_difference, model.mae_difference):
            assert difference is not None
            assert 0.8 * users <= difference.users <= users
            assert difference.testable == testable
            assert difference.significant == (testable and (difference.low > 0 or difference.high < 0))
    assert any(model.auc_difference.significant for model in others if model.auc_difference) == testable


@pytest.mark.parametrize("behind", [19, 20])
@pytest.mark.parametrize("kind", ["positives", "negatives", "times"])
def test_few_users_behind_one_outcome_prevent_a_test(kind: str, behind: int, tmp_path: Path) -> None:
    """Positives, negatives or known times of one averaged outcome are from a few of 40 users."""
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3})
    results = read_experiment(str(folder))
    averaged = AveragedOutcomes.from_test(results.runs[0].test)
    for run in results.runs:
        predictions, names = read_predictions(run.predictions)
        row = np.unique(predictions.user, return_inverse=True)[1]
        if kind == "times":
            column = names.index(averaged.times[0])
            predictions.observed_time[:, column] = np.where(row < behind, 1.0, np.nan)
        else:
            column, label = names.index(averaged.outcomes[0]), float(kind == "positives")
            predictions.occurred[:, column] = np.where(row < behind, label, 1 - label)
        write_predictions(run.predictions, predictions, CARD)
    model = compared(folder).models[1]
    auc, mae = model.auc_difference, model.mae_difference
    assert auc is not None
    assert mae is not None
    if kind == "times":
        assert (auc.testable, mae.users, mae.testable) == (True, behind, behind >= 20)
    else:
        assert (auc.users, auc.testable, mae.testable) == (behind, behind >= 20, True)


def test_ablations_are_compared_with_their_model(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, {"mmoe": 0.3, "a2gen": 1.0}, {"plain": 0.5})
    file = folder / "results.json"
    file.write_text(file.read_text().replace('"ablation_of": "mmoe"', '"ablation_of": "a2gen"'))
    comparison = compared(folder)
    assert [(model.name, model.ablation_of, model.reference) for model in comparison.models] == [
        ("mmoe", "", ""),
        ("a2gen", "", "mmoe"),
        ("plain", "a2gen", "a2gen"),
    ]
    assert [model.name for model in comparison.full_models] == ["mmoe", "a2gen"]


def test_ablation_without_its_model_has_no_difference(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3}, {"plain": 0.5})
    file = folder / "results.json"
    results = json.loads(file.read_text())
    results["runs"] = [run for run in results["runs"] if run["model"] != "a2gen"]
    file.write_text(json.dumps(results))
    comparison = compared(folder)
    assert [(model.name, model.reference) for model in comparison.models] == [("mmoe", ""), ("plain", "")]
    assert all(model.auc_difference is None for model in comparison.models)


def test_one_seed_without_times_has_no_deviation_and_no_mae(tmp_path: Path) -> None:
    comparison = compared(write_experiment(tmp_path, {"a2gen": 1.0}, card=plain_card()))
    (model,) = comparison.models
    assert model.auc is not None
    assert model.auc.std is None
    assert (model.mae_log, model.mae_interval, comparison.timed) == (None, None, {})
    assert comparison.scored == ["like", "comment", "follow"]


def test_objectives_missing_in_a_model_are_left_out(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3})
    file = folder / "runs/one/1/test.json"
    test = json.loads(file.read_text())
    del test["objectives"]["glance"]
    file.write_text(json.dumps(test))
    assert compared(folder).scored == [*ROWS, "effective"]


def test_rejects_predictions_of_other_users(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3})
    predictions = make_predictions(CARD, 1.0, 0)
    file = read_experiment(str(folder)).runs[1].predictions
    write_predictions(file, replace(predictions, user=predictions.user + 1), CARD)
    with pytest.raises(DataError, match=f"{file}: users differ"):
        compared(folder)


def test_mean_is_unknown_if_a_seed_is_unknown() -> None:
    assert mean_std([1.0, 3.0]) == MeanStd(2.0, pytest.approx(2**0.5))
    assert mean_std([1.0, None]) is mean_std([]) is mean_std([float("nan")]) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", "not a results file of an experiment"),
        ('{"suite": {}}', "not a results file of an experiment ('models' is missing)"),
        (json.dumps(EMPTY | {"runs": [{}]}), "'test' is missing"),
        (json.dumps(EMPTY | {"failed": [{}]}), "'phase' is missing"),
        (json.dumps(EMPTY | {"runs": 3}), "not a results file of an experiment"),
        (json.dumps(EMPTY), "no run has been tested"),
    ],
)
def test_rejects_invalid_results(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError) as raised:
        read_experiment(str(tmp_path))
    assert str(raised.value).startswith(f"{tmp_path}/results.json: ")
    assert message in str(raised.value)


def test_rejects_missing_results_and_invalid_evaluations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results\.json found"):
        read_experiment(str(tmp_path))
    folder = write_experiment(tmp_path / "made", {"a2gen": 1.0})
    (folder / "runs/one/0/test.json").write_text("{}")
    with pytest.raises(DataError, match=r"runs/one/0/test\.json: not an evaluation \('targets' is missing\)"):
        read_experiment(str(folder))


def test_new_and_known_items(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, {"a2gen": 1.0, "mmoe": 0.3}, seeds=(0, 1, 2), new_items=0.5)
    results, comparison = read_experiment(str(folder)), compared(folder)
    new, known = comparison.subsets
    assert (new.is_new, known.is_new, new.targets + known.targets) == (True, False, comparison.targets)
    for subset in (new, known):
        for row, model in zip(subset.rows, ("a2gen", "mmoe"), strict=True):
            means, errors = [], []
            for run in results.runs_of("one", model):
                predictions, names = read_predictions(run.predictions)
                included = (predictions.item == 0) == subset.is_new
                assert included.sum() == subset.targets
                columns = [names.index(name) for name in subset.averaged.outcomes]
                means.append(
                    np.mean(
                        [auc(predictions.probability[included, i], predictions.occurred[included, i]) for i in columns]
                    )
                )
                timed = [names.index(name) for name in subset.averaged.times]
                error = np.abs(predictions.time - predictions.observed_time)[included]
                errors.append(np.mean([np.nanmean(error[:, i]) for i in timed]))
            assert row.auc is not None
            assert row.mae_log is not None
            assert row.auc.mean == pytest.approx(np.mean(means))
            assert row.mae_log.mean == pytest.approx(np.mean(errors), rel=1e-5)
        difference = subset.rows[1].auc_difference
        assert subset.rows[0].auc_difference is None
        assert difference is not None
        assert difference.low < difference.value < difference.high < 0
    titles = [table.title for table in dataset_tables(comparison)]
    assert titles[-2:] == ["New items", "Known items"]


def test_no_subsets_with_few_new_items(tmp_path: Path) -> None:
    assert compared(write_experiment(tmp_path, {"a2gen": 1.0}, new_items=0.1)).subsets == []
