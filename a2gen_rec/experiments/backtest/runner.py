"""Runner of a backtest: executes its steps, several at a time, and reuses those of an interrupted one."""

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from a2gen_rec.config import Config, PrepareConfig
from a2gen_rec.config.backtest import BacktestConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.experiments.backtest.steps import BacktestPlan, Log, Step, plan_backtest, ready
from a2gen_rec.experiments.command_runner import CommandRunner, RunCommand, check_command, sigterm_as_keyboard_interrupt
from a2gen_rec.experiments.log_state import differing, read_log_state
from a2gen_rec.experiments.output_lock import locked_output
from a2gen_rec.training.checkpoint import TrainState
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import select_device
from a2gen_rec.utils.environment import collect_env

SETTINGS_FILE, STATE_FILE, STEPS_DIR = "settings.yaml", "backtest.json", "steps"


@dataclass(frozen=True)
class StepRecord:
    """Cost of a finished step.

    Attributes:
        seconds: Duration of the command; of a training, of its optimizer steps over all resumptions.
        bytes: Size of what it wrote.
    """

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Backtest:
    """A finished backtest.

    Attributes:
        out: Output directory.
        log: Raw log.
        settings: Training policies.
        plan: Steps and evaluations.
        records: Step -> its cost.
        machine: Machine and versions.
        command: Command line.
    """

    out: str
    log: Log
    settings: BacktestConfig
    plan: BacktestPlan
    records: dict[str, StepRecord]
    machine: dict[str, Any]
    command: str


def run_backtest(
    log: Log,
    settings: BacktestConfig,
    prepare: PrepareConfig,
    config: Config,
    out: str,
    jobs: int = 1,
    report: Callable[[str], None] = print,
    run_command: RunCommand | None = None,
    command: str = "",
) -> Backtest:
    """Run all missing steps of a backtest.

    Args:
        log: Raw log, and the days on which models are evaluated.
        settings: Training policies.
        prepare: Settings of all datasets.
        config: Settings of all trainings.
        out: Local output directory; an existing backtest is resumed.
        jobs: Number of concurrent commands.
        report: Called with lines of progress.
        run_command: Runner of commands; by default :class:`CommandRunner`.
        command: Command line, for the results.

    Raises:
        ConfigError: ``jobs`` < 1, the last day is before the first, or the model is not trained step by step.
        UserError: A step failed, or ``out`` has a backtest of another log or other settings.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs} must be at least 1")
    if log.last < log.first:
        raise ConfigError(f"--to {log.last} is before --from {log.first}")
    if config.model.name == "gbdt":
        raise ConfigError("model.name gbdt has no parameters that a backtest could continue")
    if config.train.forkmerge.merge_interval_epochs:
        raise ConfigError("train.forkmerge: a backtest trains without validation, which ForkMerge needs")
    if config.train.replay_share:
        raise ConfigError("train.replay_share: a backtest has --replay-share, for the policy replay")
    if not paths.is_local(out):
        raise UserError(f"{out}: must be a local directory")
    out = os.path.abspath(out)
    paths.ensure_writable_dir(paths.join(out, STEPS_DIR))
    with sigterm_as_keyboard_interrupt(), locked_output(out, "backtest"):
        _check_state(log, settings, prepare, config, out)
        plan = plan_backtest(log, settings, prepare, config, out)
        runner = CommandRunner()
        execution = _Execution(plan, out, report, run_command or runner, runner.stop)
        execution.run(jobs)
    return Backtest(
        out, log, settings, plan, execution.records, collect_env(select_device(config.train.device)), command
    )


def _check_state(log: Log, settings: BacktestConfig, prepare: PrepareConfig, config: Config, out: str) -> None:
    """Record log and settings; in an existing backtest, check that they are the same.

    Further policies, later last days, and files added to the log are no difference: they add steps.
    """
    policies = asdict(settings)
    del policies["policies"]
    state: dict[str, dict[str, Any]] = {
        "log": {"source": log.source, "first day": str(log.first), **read_log_state(log.raw, log.spec, out)},
        "prepare": asdict(prepare),
        "training": asdict(config),
        "policies": policies,
    }
    file, text = paths.join(out, STATE_FILE), json.dumps(state, indent=1)
    if not paths.exists(file):
        paths.write_text(paths.join(out, SETTINGS_FILE), yaml.safe_dump(asdict(config), sort_keys=False))
        paths.write_text(file, text + "\n")
        return
    try:
        before = json.loads(paths.read_text(file))
        files = state["log"]["files"]
        state["log"]["files"] = {name: files[name] for name in before["log"]["files"] if name in files}
        changed = [
            f"{part} {key}"
            for part, now in json.loads(json.dumps(state)).items()
            for key in differing(before[part], now)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the state of a backtest ({error})") from error
    if changed:
        raise UserError(f"{out}: is a backtest with other settings ({', '.join(changed)}); choose another --out")


class _Execution:
    """State of running steps."""

    def __init__(
        self,
        plan: BacktestPlan,
        out: str,
        report: Callable[[str], None],
        run_command: RunCommand,
        stop: Callable[[], None],
    ) -> None:
        self.plan, self.out, self.report, self.run_command, self.stop = plan, out, report, run_command, stop
        self.records = {name: record for name in plan.steps if (record := self._read(name)) is not None}

    def run(self, jobs: int) -> None:
        steps = self.plan.steps
        reused = f", {len(self.records)} already done" if self.records else ""
        self.report(f"{len(steps)} steps{reused}")
        running: dict[Future[StepRecord], Step] = {}
        started = set(self.records)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while len(self.records) < len(steps):
                    for step in list(ready(self.plan, set(self.records), started))[: jobs - len(running)]:
                        running[pool.submit(self._run, step)] = step
                        started.add(step.name)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        step = running.pop(future)
                        self.records[step.name] = record = future.result()
                        self.report(f"[{len(self.records)}/{len(steps)}] {step.name}: {record.seconds:.0f} s")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def _run(self, step: Step) -> StepRecord:
        if step.kind == "prepare":
            shutil.rmtree(step.output, ignore_errors=True)  # complete, but its step was killed before the record
        paths.ensure_writable_dir(os.path.dirname(step.output))
        log, start = self._file(step.name, "txt"), time.monotonic()
        check_command(self.run_command, step.arguments, log, step.name)
        seconds = _training_seconds(step.output) if step.kind == "train" else time.monotonic() - start
        record = StepRecord(round(seconds, 2), _size(step.output))
        paths.write_text(self._file(step.name, "json"), json.dumps(asdict(record)) + "\n")
        return record

    def _read(self, name: str) -> StepRecord | None:
        """Return the record of a finished step; None if it is missing or damaged."""
        file = self._file(name, "json")
        try:
            return StepRecord(**json.loads(paths.read_text(file))) if paths.exists(file) else None
        except (ValueError, TypeError):
            return None

    def _file(self, name: str, kind: str) -> str:
        return paths.join(self.out, STEPS_DIR, f"{name.replace(' ', '-')}.{kind}")


def _training_seconds(run: str) -> float:
    latest = RunDir(run).latest_checkpoint()
    if latest is None:
        raise UserError(f"{run}: has no checkpoint")
    return TrainState.read(latest).seconds


def _size(path: str) -> int:
    """Return the bytes of a file or of all files of a directory."""
    files = [Path(path)] if os.path.isfile(path) else Path(path).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
