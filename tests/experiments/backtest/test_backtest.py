"""A backtest of a small log of six days: results, costs, page, resumption."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.config import BacktestConfig, PrepareConfig, SimulateConfig
from a2gen_rec.config.parse import config_from_dict
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.evaluation.metrics import binary_metrics
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.backtest.advice import advice, advised_policy
from a2gen_rec.experiments.backtest.comparison import BacktestComparison, PolicyCost, PolicyResult, compare_policies
from a2gen_rec.experiments.backtest.day_metrics import DayPredictions, subset_masks
from a2gen_rec.experiments.backtest.runner import Backtest, run_backtest
from a2gen_rec.experiments.backtest.steps import Log
from a2gen_rec.experiments.bootstrap import resample_weights
from a2gen_rec.experiments.command_runner import CommandRunner, cli_arguments
from a2gen_rec.experiments.differences import Difference
from a2gen_rec.reporting.pages.backtest.page import write_backtest_report
from a2gen_rec.simulation.simulator import simulate
from tests.helpers.distributed import CommandJob

pytestmark = pytest.mark.processes

PREPARE = PrepareConfig(capacity=1.5, ttl_days=2.0, num_partitions=2, threads=1, memory_limit_gb=0.5)
RESAMPLES = 20
SMALL = {"model.dim": 8, "model.num_heads": 2, "model.time_buckets": 8, "loader.max_impressions_per_batch": 200}


class Commands:
    """Runner of commands in forked processes, which records them."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def __call__(self, arguments: Sequence[str], log: str) -> int:
        self.calls.append(Path(log).stem)
        Path(log).unlink(missing_ok=True)
        if self.failing and self.failing in log:
            Path(log).write_text("a2gen: error: out of luck\n")
            return 1
        (code,), _ = CommandJob(1, Path(log), arguments).wait()
        return code


def make_log(raw: Path, last: int = 5) -> Log:
    return Log("simulated", str(raw), "", date(2024, 3, 4), date(2024, 3, last))


def config(**changes: Any) -> Any:
    settings: dict[str, dict[str, Any]] = {}
    for name, value in {**SMALL, "train.epochs": 1, **changes}.items():
        section, _, setting = name.partition(".")
        settings.setdefault(section, {})[setting] = value
    return config_from_dict(settings)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backtest") / "log"
    simulate(str(folder), SimulateConfig(users=60, items=60, days=6, births_per_day=0.2))
    return folder


@pytest.fixture(scope="module")
def backtest(raw: Path) -> Backtest:
    return run_backtest(
        make_log(raw), BacktestConfig(), PREPARE, config(), str(raw.parent / "out"), 2, run_command=Commands()
    )


@pytest.fixture(scope="module")
def comparison(backtest: Backtest) -> BacktestComparison:
    return compare_policies(backtest, RESAMPLES)


def evaluations(backtest: Backtest, policy: str) -> list[dict[str, Any]]:
    files = [each.evaluation for each in backtest.plan.evaluations if each.policy == policy]
    return [json.loads(Path(file).read_text()) for file in files]


def test_warm_starts_have_the_same_evaluation(backtest: Backtest) -> None:
    """The evaluation of a day equals the one that the training on that day does before it starts."""
    for policy in ("warm", "replay"):
        evaluation = evaluations(backtest, policy)[0]
        progressive = json.loads(Path(backtest.out, "runs", f"{policy}-2024-03-04", "progressive.json").read_text())
        assert progressive["actions"] == evaluation["actions"]
        assert progressive["time"] == evaluation["time"]


@pytest.mark.parametrize("policy", ["frozen", "retrain", "warm", "replay"])
def test_means_are_those_of_the_evaluations(policy: str, backtest: Backtest, comparison: BacktestComparison) -> None:
    result = comparison.policy(policy)
    assert result is not None
    days = evaluations(backtest, policy)
    names, times = comparison.averaged.outcomes, comparison.averaged.times
    aucs = [np.mean([day["actions"][name]["auc"] for name in names]) for day in days]
    maes = [np.mean([day["time"][name]["mae_log"] for name in times]) for day in days]
    assert result.auc["all"] == pytest.approx(np.mean(aucs))
    assert result.mae_log["all"] == pytest.approx(np.mean(maes), rel=1e-5)
    assert [day.auc["like"] for day in result.days] == [
        pytest.approx(day["actions"]["like"]["auc"]) if day["actions"]["like"]["auc"] is not None else None
        for day in days
    ]
    if policy == comparison.novelty_policy:
        for subset in ("new items", "known items"):
            expected = [np.mean([day["subsets"][subset]["actions"][name]["auc"] for name in names]) for day in days]
            assert result.auc[subset] == pytest.approx(np.mean(expected))


def test_all_policies_are_measured_on_the_same_targets(backtest: Backtest, comparison: BacktestComparison) -> None:
    """The datasets of ``retrain`` have other rows, but the same impressions in the same order.

    Objectives follow the thresholds of each lineage, and are not compared.
    """
    of_day: dict[date, list[DayPredictions]] = {}
    for each in backtest.plan.evaluations:
        of_day.setdefault(each.day, []).append(DayPredictions.read(each.predictions))
    for others in of_day.values():
        first = others[0].predictions
        for other in others[1:]:
            np.testing.assert_array_equal(other.predictions.user, first.user)
            columns = [others[0].names.index(name) for name in comparison.outcomes]
            np.testing.assert_array_equal(other.predictions.occurred[:, columns], first.occurred[:, columns])
            np.testing.assert_array_equal(other.predictions.oracle, first.oracle)
        masks = subset_masks(first)
        assert masks["new items"].any()
        assert masks["known items"].any()


def test_targets_are_aligned_by_time(raw: Path, tmp_path: Path) -> None:
    """Batches have windows of similar length, so that rows of a lineage with less history are in another order."""
    settings = BacktestConfig(policies=["retrain", "frozen"], window_days=1)
    prepare = replace(PREPARE, max_history=6, max_targets=3)
    small = config(**{"loader.max_windows_per_batch": 7})
    result = run_backtest(make_log(raw, 5), settings, prepare, small, str(tmp_path / "out"), 2, run_command=Commands())
    files = [each.predictions for each in result.plan.evaluations if each.day == date(2024, 3, 5)]
    first, second = (DayPredictions.read(file).predictions for file in files)
    np.testing.assert_array_equal(first.ts_ms, second.ts_ms)
    np.testing.assert_array_equal(first.oracle, second.oracle)
    np.testing.assert_array_equal(first.observed_time, second.observed_time)
    raw_order = [read_predictions(file)[0].ts_ms for file in files]
    assert not np.array_equal(*raw_order), "the files are in another order"
    comparison = compare_policies(result, RESAMPLES)
    assert (comparison.reference, comparison.novelty_policy) == ("retrain", "retrain")


def test_resamples_are_metrics_of_repeated_users(backtest: Backtest, comparison: BacktestComparison) -> None:
    """A resample of a day equals the metrics over impressions that are repeated as often as their user is drawn."""
    warm = comparison.policy("warm")
    assert warm is not None
    days = [DayPredictions.read(each.predictions) for each in backtest.plan.evaluations if each.policy == "warm"]
    users = np.unique(np.concatenate([day.predictions.user for day in days]))
    draws = resample_weights(len(users), RESAMPLES)[:, 3].astype(int)
    predictions = days[1].predictions
    included = np.repeat(np.arange(len(predictions.user)), draws[np.searchsorted(users, predictions.user)])
    included = included[predictions.item[included] > 0]
    aucs, maes = [], []
    for name in comparison.averaged.outcomes:
        column = days[1].names.index(name)
        scores, labels = predictions.probability[included, column], predictions.occurred[included, column]
        metrics = binary_metrics(scores, labels, predictions.user[included])
        aucs.append(metrics["auc"])
    for name in comparison.averaged.times:
        column = days[1].names.index(name)
        maes.append(np.nanmean(np.abs(predictions.time - predictions.observed_time)[included, column]))
    assert warm.days[1].mean_auc["known items"][4] == pytest.approx(np.mean(aucs))
    assert warm.days[1].mean_mae["known items"][4] == pytest.approx(np.mean(maes), rel=1e-5)
    difference = warm.auc_differences["frozen"]["known items"]
    frozen = comparison.policy("frozen")
    assert difference is not None
    assert frozen is not None
    assert difference.value == pytest.approx(warm.auc["known items"] - frozen.auc["known items"])
    assert difference.low < difference.value < difference.high


def test_costs_are_those_of_the_steps(backtest: Backtest, comparison: BacktestComparison) -> None:
    cost = {policy.name: policy.cost for policy in comparison.policies}
    assert [cost[name].trainings for name in ("frozen", "retrain", "warm", "replay")] == [0, 1, 1, 1]
    expected = backtest.records["train warm-2024-03-04"].seconds
    assert cost["warm"].training_s == pytest.approx(expected)
    assert expected > 0
    assert cost["retrain"].bytes > cost["warm"].bytes > cost["frozen"].bytes == 0


def test_tables(comparison: BacktestComparison) -> None:
    items = [table for table in comparison.tables if table.feature == "item_id"]
    assert [table.day for table in items] == ["base", "2024-03-04", "2024-03-05"]
    assert sum(table.retired for table in items[1:]) > 0
    assert sum(table.admitted for table in items[1:]) > 0
    assert all(table.values < table.rows for table in items)


def test_page_and_results(backtest: Backtest, comparison: BacktestComparison, tmp_path: Path) -> None:
    files = write_backtest_report(backtest, comparison, str(tmp_path / "days.md"))
    page, markdown, results = (Path(file).read_text() for file in files)
    charts = re.findall(r"\((days/[a-z-]+-\d\.svg)\)", markdown)
    assert sorted(charts) == sorted(f"days/{file.name}" for file in (tmp_path / "days").iterdir())
    assert len(charts) == 5
    for title in ("Advice", "Policies", "Days", "Model age", "New items and users", "Actions", "Cost", "Table rows"):
        assert f"<h2>{title}</h2>" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    content = json.loads(results)
    warm = next(policy for policy in content["policies"] if policy["name"] == "warm")
    assert warm["auc"]["all"] == pytest.approx(comparison.policies[2].auc["all"])
    assert len(warm["days"]) == 2
    assert content["advice"] == advice(comparison)


def test_a_finished_backtest_runs_nothing(raw: Path, backtest: Backtest) -> None:
    """Files that are added to the log change nothing before a later last day; a damaged record repeats its step."""
    (raw / "2024-03-07").mkdir()
    (raw / "2024-03-07" / "README").write_text("")
    try:
        commands = Commands()
        again = run_backtest(make_log(raw), BacktestConfig(), PREPARE, config(), backtest.out, run_command=commands)
        assert not commands.calls
        assert again.records == backtest.records
        Path(backtest.out, "steps", "evaluate-base-on-2024-03-05.json").write_text("{")
        run_backtest(make_log(raw), BacktestConfig(), PREPARE, config(), backtest.out, run_command=commands)
        assert commands.calls == ["evaluate-base-on-2024-03-05"]
    finally:
        shutil.rmtree(raw / "2024-03-07")


def test_an_interrupted_backtest_runs_what_is_missing(raw: Path, tmp_path: Path) -> None:
    """A failed step is named with its reason; days and policies can be added later."""
    out, settings = str(tmp_path / "out"), BacktestConfig(policies=["frozen"])
    with pytest.raises(UserError, match=r"train base exited with code 1: out of luck; see .*train-base\.txt"):
        run_backtest(make_log(raw, 4), settings, PREPARE, config(), out, run_command=Commands("train-base"))
    commands = Commands()
    run_backtest(make_log(raw, 4), settings, PREPARE, config(), out, run_command=commands)
    assert "train-base" in commands.calls
    assert "prepare-base" not in commands.calls
    commands = Commands()
    settings = BacktestConfig(policies=["frozen", "warm"])
    run_backtest(make_log(raw, 5), settings, PREPARE, config(), out, run_command=commands)
    assert sorted(commands.calls) == [
        "evaluate-base-on-2024-03-05",
        "evaluate-warm-2024-03-04-on-2024-03-05",
        "prepare-2024-03-05",
        "train-warm-2024-03-04",
    ]
    for changed, message in [
        ({"config": config(**{"optim.dense_lr": 0.5})}, "training optim dense_lr"),
        ({"prepare": replace(PREPARE, ttl_days=3.0)}, "prepare ttl_days"),
        ({"settings": BacktestConfig(warm_epochs=3)}, "policies warm_epochs"),
        ({"log": replace(make_log(raw), first=date(2024, 3, 3))}, "log first day"),
        ({"log": replace(make_log(raw), raw=str(raw.parent))}, "log raw"),
    ]:
        arguments = {"log": make_log(raw), "settings": settings, "prepare": PREPARE, "config": config()} | changed
        with pytest.raises(UserError, match=f"other settings .*{message}"):
            run_backtest(**arguments, out=out, run_command=Commands())  # type: ignore[arg-type]


def test_rejects_invalid_settings(raw: Path, tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        arguments = {
            "log": make_log(raw),
            "settings": BacktestConfig(),
            "prepare": PREPARE,
            "config": config(),
        } | changes
        run_backtest(**arguments, out=str(tmp_path / "out"), run_command=Commands())

    with pytest.raises(ConfigError, match="--to 2024-03-01 is before --from 2024-03-04"):
        run(log=make_log(raw, 1))
    with pytest.raises(ConfigError, match="--jobs 0"):
        run(jobs=0)
    with pytest.raises(ConfigError, match="gbdt"):
        run(config=config(**{"model.name": "gbdt"}))
    with pytest.raises(ConfigError, match="a backtest has --replay-share"):
        run(config=config(**{"train.replay_share": 0.5}))
    with pytest.raises(ConfigError, match="a backtest trains without validation"):
        run(config=config(**{"train.forkmerge": {"merge_interval_epochs": 1, "branch_loss_weights": [{}, {}]}}))
    with pytest.raises(ConfigError, match="policies"):
        BacktestConfig(policies=["warm", "warm"])
    assert not (tmp_path / "out").exists()


def test_command(
    raw: Path, backtest: Backtest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options are the settings of the finished backtest, so that the command only writes its report."""
    commands = Commands()
    monkeypatch.setattr(CommandRunner, "__call__", lambda _, arguments, log: commands(arguments, log))
    command = ["backtest", "--source", "simulated", "--raw", str(raw), "--from", "2024-03-04"]
    prepare = {name: getattr(PREPARE, name) for name in ("capacity", "ttl_days", "num_partitions", "memory_limit_gb")}
    options = cli_arguments(SMALL | {"train.epochs": 1} | {f"prepare.{name}": x for name, x in prepare.items()})
    Path(backtest.out, "report.html").unlink(missing_ok=True)
    main([*command, "--to", "2024-03-05", "--out", backtest.out, *options, "--bootstrap-resamples", "10"])
    assert not commands.calls
    assert Path(backtest.out, "report.html").exists()
    output = capsys.readouterr().out
    assert re.search(r"^warm +0\.\d{4} +[+−]0\.\d{4} \[", output, re.MULTILINE)
    for changes, message in [
        (["--to", "soon", "--out", backtest.out], "--to 'soon' is not a day such as 2024-03-11"),
        (["--to", "2024-03-05", "--out", backtest.out, "--bootstrap-resamples", "0"], "must be at least 1"),
    ]:
        with pytest.raises(SystemExit):
            main([*command, *changes, *options])
        assert message in capsys.readouterr().err


# --- advice -------------------------------------------------------------------------------------------------------


def make_difference(value: float) -> Difference:
    return Difference(value, value - 0.001, value + 0.001, 0.01, False, 100)


def make_result(name: str, auc: float, training_s: float, num_days: int = 2) -> PolicyResult:
    differences = {other: {"all": make_difference(0.01)} for other in ("frozen", "retrain") if other != name}
    by_age = {2: make_difference(-0.02)} if name == "frozen" else {}
    days: list[Any] = [None] * num_days
    cost = PolicyCost(1, training_s, 0.0, 0)
    return PolicyResult(name, days, {"all": auc}, {"all": math.nan}, differences, {}, by_age, cost)


def make_comparison(aucs: dict[str, float], num_days: int = 2) -> BacktestComparison:
    seconds = {"frozen": 0.0, "warm": 1.0, "retrain": 10.0}
    policies = [make_result(name, auc, seconds[name], num_days) for name, auc in aucs.items()]
    return BacktestComparison(policies, "retrain", "warm", None, [], [], 0, 0, 0.0, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("aucs", "expected"),
    [
        ({"frozen": 0.70, "retrain": 0.75, "warm": 0.748}, "warm"),
        ({"frozen": 0.70, "retrain": 0.75, "warm": 0.746}, "retrain"),
        ({"frozen": 0.748, "retrain": 0.75, "warm": 0.749}, "frozen"),
        ({"frozen": math.nan, "retrain": 0.75, "warm": 0.75}, "warm"),
    ],
)
def test_the_cheapest_policy_near_the_best_is_advised(aucs: dict[str, float], expected: str) -> None:
    advised = advised_policy(make_comparison(aucs))
    assert advised is not None
    assert advised.name == expected


def test_advice() -> None:
    assert advice(make_comparison({"frozen": 0.70, "retrain": 0.75, "warm": 0.748})) == (
        "Continue the model with each day (`--init-from`): mean AUC 0.7480, +0.0100 [+0.0090, +0.0110] against "
        "retraining at 10% of its training time, +0.0100 [+0.0090, +0.0110] against a model that is never trained "
        "again. At an age of 2 days, that model differs from retrain by −0.0200 [−0.0210, −0.0190]."
    )


@pytest.mark.parametrize(
    "comparison",
    [
        make_comparison({"frozen": 0.7}),
        make_comparison({"frozen": 0.7, "warm": 0.7}, num_days=1),
        make_comparison({"frozen": math.nan, "warm": math.nan}),
    ],
)
def test_no_advice_without_a_comparison(comparison: BacktestComparison) -> None:
    assert advice(comparison).startswith("No advice")
