"""Steps of a backtest: the commands that prepare its days, train its runs and evaluate them.

::

    OUT/data/base/            days before the first one, all of them training
    OUT/data/2024-03-11/      increment of a day
    OUT/retrain/2024-03-12/   of a later training from scratch: its dataset (data/) and the increments of the days on
                              which it is evaluated (next/)
    OUT/runs/base/            run of the first dataset
    OUT/runs/warm-2024-03-11/       run that has also learned a day; replay-… and retrain-… likewise
    OUT/evaluations/base/2024-03-11.json, .parquet    a run's evaluation on a day, and its predictions
    OUT/steps/                a record per finished step, and its output
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from a2gen_rec.config import Config, PrepareConfig
from a2gen_rec.config.backtest import BacktestConfig
from a2gen_rec.experiments.command_runner import cli_arguments
from a2gen_rec.utils import paths

BASE = "base"


@dataclass(frozen=True)
class Log:
    """Raw log of a backtest.

    Attributes:
        source: Name of the source.
        raw: File or directory.
        spec: Description of a generic log; empty for none.
        first: First day on which models are evaluated.
        last: Last such day.
    """

    source: str
    raw: str
    spec: str
    first: date
    last: date

    @property
    def days(self) -> list[date]:
        """Days on which models are evaluated."""
        return [self.first + timedelta(days=number) for number in range((self.last - self.first).days + 1)]


@dataclass(frozen=True)
class Step:
    """A command of a backtest.

    Attributes:
        name: Unique name, such as ``train warm-2024-03-11``.
        arguments: Arguments of ``a2gen``.
        output: Directory or file that the command writes.
        needs: Names of the steps whose output it reads.
    """

    name: str
    arguments: list[str]
    output: str
    needs: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The command: ``prepare``, ``train`` or ``evaluate``."""
        return self.arguments[0]


@dataclass(frozen=True)
class EvaluatedDay:
    """Evaluation of a policy's model on a day.

    Attributes:
        policy: Name of the policy.
        day: The day.
        age: Days since the last day that the model has learned; 1 for the day before.
        run: Name of the run.
        evaluation: JSON file of the evaluation.
        predictions: Parquet file of the predictions.
    """

    policy: str
    day: date
    age: int
    run: str
    evaluation: str
    predictions: str


@dataclass
class BacktestPlan:
    """All steps and evaluations of a backtest.

    Attributes:
        steps: Name -> step, in the order of the days.
        evaluations: Evaluations of all policies.
    """

    steps: dict[str, Step] = field(default_factory=dict)
    evaluations: list[EvaluatedDay] = field(default_factory=list)


def plan_backtest(log: Log, backtest: BacktestConfig, prepare: PrepareConfig, config: Config, out: str) -> BacktestPlan:
    """Return the steps of a backtest in the directory ``out``. Policies share the steps that are equal."""
    return _Planner(log, backtest, prepare, config, out).plan()


@dataclass
class _Planner:
    log: Log
    backtest: BacktestConfig
    prepare: PrepareConfig
    config: Config
    out: str
    result: BacktestPlan = field(default_factory=BacktestPlan)

    def plan(self) -> BacktestPlan:
        base = self._prepare_base(BASE, paths.join(self.out, "data", BASE), self.log.first)
        self._train(BASE, base)
        for day in self.log.days:
            for policy in self.backtest.policies:
                run, learned = self._run_of(policy, day)
                data = self._prepare_day(learned if policy == "retrain" else self.log.first, day)
                self._evaluate(policy, run, data, day, (day - learned).days + 1)
        return self.result

    def _run_of(self, policy: str, day: date) -> tuple[str, date]:
        """Return the run that a policy has on a day, and the day after the last one that it has learned."""
        first, age = self.log.first, (day - self.log.first).days
        if policy == "retrain":
            start = day - timedelta(days=age % self.backtest.retrain_interval_days)
            return self._retrain(start) if start > first else BASE, start
        if policy == "frozen" or not age:
            return BASE, first
        return self._warm_start(policy, day - timedelta(days=1)), day

    def _retrain(self, day: date) -> str:
        """Train from scratch on the days before one."""
        name = f"retrain-{day}"
        data = self._prepare_base(name, paths.join(self.out, "retrain", str(day), "data"), day)
        self._train(name, data)
        return name

    def _warm_start(self, policy: str, day: date) -> str:
        """Continue the run of the day before with a day."""
        name, earlier = f"{policy}-{day}", self._run_of(policy, day)[0]
        data, settings = self._prepare_day(self.log.first, day), {"train.epochs": self.backtest.warm_epochs}
        if policy == "replay":
            settings |= {"train.replay_share": self.backtest.replay_share}  # type: ignore[dict-item]
        arguments = ["--init-from", self._run_dir(earlier), *cli_arguments(settings)]
        self._train(name, data, arguments, [f"train {earlier}"])
        return name

    def _prepare_base(self, name: str, data: str, day: date) -> str:
        """Prepare the days before one, all of them as training."""
        window = self.backtest.window_days
        settings: dict[str, Any] = {"start": day - timedelta(days=window)} if window else {}
        self._prepare(name, data, {**settings, "end": day, "train_only": "true"})
        return data

    def _prepare_day(self, first: date, day: date) -> str:
        """Prepare a day as an increment of the lineage that starts before the day ``first``."""
        is_base, before = first == self.log.first, day - timedelta(days=1)
        lineage = self.out if is_base else paths.join(self.out, "retrain", str(first))
        if day > first:
            earlier = self._prepare_day(first, before)
        else:
            earlier = paths.join(lineage, "data", BASE) if is_base else paths.join(lineage, "data")
        data = paths.join(lineage, "data" if is_base else "next", str(day))
        name = str(day) if is_base else f"{day} after {first}"
        limits = {"start": day, "end": day + timedelta(days=1)}
        self._prepare(name, data, limits, ["--base", earlier], [self._step_of(earlier)])
        return data

    def _prepare(
        self,
        name: str,
        data: str,
        limits: Mapping[str, Any],
        arguments: Sequence[str] = (),
        needs: Sequence[str] = (),
    ) -> None:
        spec = ["--spec", self.log.spec] if self.log.spec else []
        settings = cli_arguments({**_changed(self.prepare), **limits})
        command = ["prepare", self.log.source, "--raw", self.log.raw, "--out", data, *spec, *arguments, *settings]
        self._add(Step(f"prepare {name}", command, data, list(needs)))

    def _train(self, name: str, data: str, arguments: Sequence[str] = (), needs: Sequence[str] = ()) -> None:
        settings, run = paths.join(self.out, "settings.yaml"), self._run_dir(name)
        command = ["train", "--config", settings, "--data", data, "--run", run, *arguments]
        self._add(Step(f"train {name}", command, run, [self._step_of(data), *needs]))

    def _evaluate(self, policy: str, run: str, data: str, day: date, age: int) -> None:
        folder = paths.join(self.out, "evaluations", run)
        result, predictions = (paths.join(folder, f"{day}.{kind}") for kind in ("json", "parquet"))
        command = ["evaluate", "--run", self._run_dir(run), "--data", data, "--split", "train"]
        command += ["--json", result, "--predictions", predictions, "--device", self.config.train.device]
        command += cli_arguments(vars(self.config.evaluate))
        self._add(Step(f"evaluate {run} on {day}", command, result, [f"train {run}", self._step_of(data)]))
        self.result.evaluations.append(EvaluatedDay(policy, day, age, run, result, predictions))

    def _run_dir(self, name: str) -> str:
        return paths.join(self.out, "runs", name)

    def _step_of(self, data: str) -> str:
        return next(step.name for step in self.result.steps.values() if step.output == data)

    def _add(self, step: Step) -> None:
        self.result.steps.setdefault(step.name, step)


def _changed(prepare: PrepareConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults; increments have the others of their base."""
    default = vars(PrepareConfig())
    values = {name: value for name, value in vars(prepare).items() if value != default[name]}
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}


def ready(plan: BacktestPlan, done: set[str], started: set[str]) -> Iterator[Step]:
    """Yield the steps whose needs are done, in the order of the plan."""
    for step in plan.steps.values():
        if step.name not in started and all(need in done for need in step.needs):
            yield step
