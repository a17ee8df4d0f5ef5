"""Plan of a backtest: which model is evaluated on which day, and what each command needs."""

from datetime import date
from typing import Any

import pytest

from a2gen_rec.config import BacktestConfig, Config, PrepareConfig
from a2gen_rec.experiments.backtest.steps import BacktestPlan, Log, plan_backtest, ready

LOG = Log("simulated", "/log", "", date(2024, 2, 28), date(2024, 3, 2))


def make_plan(prepare: PrepareConfig | None = None, **settings: Any) -> BacktestPlan:
    return plan_backtest(LOG, BacktestConfig(**settings), prepare or PrepareConfig(), Config(), "/out")


def evaluated(plan: BacktestPlan, policy: str) -> list[tuple[str, str, int]]:
    return [(str(each.day)[5:], each.run, each.age) for each in plan.evaluations if each.policy == policy]


def options(plan: BacktestPlan, step: str) -> dict[str, str]:
    arguments = plan.steps[step].arguments
    first = 2 if arguments[0] == "prepare" else 1
    return dict(zip(arguments[first::2], arguments[first + 1 :: 2], strict=True))


def test_models_of_policies() -> None:
    plan = make_plan()
    days = ["02-28", "02-29", "03-01", "03-02"]
    assert evaluated(plan, "frozen") == [(day, "base", age) for age, day in enumerate(days, 1)]
    assert evaluated(plan, "warm") == [
        ("02-28", "base", 1),
        ("02-29", "warm-2024-02-28", 1),
        ("03-01", "warm-2024-02-29", 1),
        ("03-02", "warm-2024-03-01", 1),
    ]
    assert [run for _, run, _ in evaluated(plan, "retrain")] == [
        "base",
        *(f"retrain-2024-{day}" for day in days[1:]),
    ]
    assert not any("2024-03-02" in name and "train" in name.split()[0] for name in plan.steps if "retrain" not in name)


def test_retraining_every_second_day() -> None:
    plan = make_plan(policies=["retrain"], retrain_interval_days=2)
    assert evaluated(plan, "retrain") == [
        ("02-28", "base", 1),
        ("02-29", "base", 2),
        ("03-01", "retrain-2024-03-01", 1),
        ("03-02", "retrain-2024-03-01", 2),
    ]
    last = options(plan, "prepare 2024-03-02 after 2024-03-01")
    assert last["--base"] == plan.steps["prepare 2024-03-01 after 2024-03-01"].output
    first = options(plan, "prepare 2024-03-01 after 2024-03-01")
    assert first["--base"] == plan.steps["prepare retrain-2024-03-01"].output


def test_parts_of_the_log() -> None:
    """Trainings from nothing read a window before their day; increments read one day."""
    plan = make_plan(PrepareConfig(capacity=2.0, ttl_days=3.0, statistics=False), window_days=7)
    base = options(plan, "prepare base")
    assert (base["--start"], base["--end"], base["--train-only"]) == ("2024-02-21", "2024-02-28", "true")
    later = options(plan, "prepare retrain-2024-03-01")
    assert (later["--start"], later["--end"]) == ("2024-02-23", "2024-03-01")
    day = options(plan, "prepare 2024-02-29")
    assert (day["--start"], day["--end"], day["--base"]) == ("2024-02-29", "2024-03-01", "/out/data/2024-02-28")
    for each in (base, later, day):
        assert (each["--capacity"], each["--ttl-days"], each["--statistics"]) == ("2.0", "3.0", "false")
    assert "--start" not in options(make_plan(), "prepare base")


def test_warm_starts_continue_the_day_before() -> None:
    plan = make_plan(warm_epochs=2, replay_share=0.25)
    warm, replay = (options(plan, f"train {policy}-2024-02-29") for policy in ("warm", "replay"))
    assert warm["--init-from"] == "/out/runs/warm-2024-02-28"
    assert (warm["--data"], warm["--train.epochs"]) == ("/out/data/2024-02-29", "2")
    assert "--train.replay-share" not in warm
    assert (replay["--init-from"], replay["--train.replay-share"]) == ("/out/runs/replay-2024-02-28", "0.25")


@pytest.mark.parametrize("jobs", [1, 3])
def test_steps_run_after_what_they_read(jobs: int) -> None:
    """Every path that a step reads inside the output directory is the output of a step that it needs."""
    plan, done, started = make_plan(), [], set[str]()
    outputs = {step.output: step.name for step in plan.steps.values()}
    while len(done) < len(plan.steps):
        batch = list(ready(plan, set(done), started))[:jobs]
        assert batch
        started |= {step.name for step in batch}
        done += [step.name for step in batch]
    for step in plan.steps.values():
        read = {outputs[word] for word in step.arguments if word in outputs and word != step.output}
        assert read <= set(step.needs), step.name
        assert all(done.index(need) < done.index(step.name) for need in step.needs)
