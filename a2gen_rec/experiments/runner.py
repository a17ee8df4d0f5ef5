"""Runner of a suite: tune every model, train the best settings with every seed, then test.

::

    OUT/data/jd/                                prepared dataset if the suite names a log
    OUT/data/jd.json                            its settings, and path, files and spec of the log
    OUT/runs/jd/ple/seed-0-1a2b3c4d/            run: settings.yaml, log.txt, checkpoints; when it is finished
        record.json                             its validation, size and speed
        test.json, test.parquet                 its evaluation and predictions, if it has the best settings
    OUT/best_settings.json                      best settings of tuning, written before any test
    OUT/results.json                            all results

A run directory is named by its seed and a digest of its dataset and settings, defaults included. Existing results are
reused and unfinished runs resumed. A dataset whose log, spec or settings changed is an error; prepared again with equal
content, it keeps its runs. Code changes do not invalidate results; each record stores its git commit. The test
split is read in the last phase only, after all decisions on validation.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from a2gen_rec.config import Config
from a2gen_rec.config.parse import config_from_dict
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.experiments.command_runner import (
    CommandRunner,
    RunCommand,
    check_command,
    cli_arguments,
    sigterm_as_keyboard_interrupt,
)
from a2gen_rec.experiments.datasets import PreparedDataset, prepare_dataset
from a2gen_rec.experiments.output_lock import locked_output
from a2gen_rec.experiments.records import summarize_run
from a2gen_rec.experiments.suite import Dataset, Model, Overrides, Suite, merge_overrides
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths
from a2gen_rec.utils.digest import hex_digest
from a2gen_rec.utils.distributed import select_device
from a2gen_rec.utils.environment import collect_env

BEST_SETTINGS_FILE, RESULTS_FILE = "best_settings.json", "results.json"
DEFAULT_NUM_SEQUENCES = 12  # reported by a test unless its settings have a number
RECORD_FILE, TEST_FILE, PREDICTIONS_FILE = "record.json", "test.json", "test.parquet"


@dataclass(frozen=True)
class Run:
    """Training run.

    Attributes:
        dataset: Name of the dataset.
        data: Dataset directory.
        model: Model.
        seed: Random seed of training.
        overrides: Settings that differ from those of the dataset, without the seed.
        settings: All settings, nested as in a file.
        config: Checked configuration of ``settings``.
        folder: Run directory.
    """

    dataset: str
    data: str
    model: Model
    seed: int
    overrides: Overrides
    settings: dict[str, Any]
    config: Config
    folder: str

    @property
    def title(self) -> str:
        """Return the name in progress lines."""
        return f"{self.dataset} · {self.model.name}, seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        """Return the identifying entries of the results."""
        names = {"dataset": self.dataset, "model": self.model.name, "ablation_of": self.model.ablation_of or None}
        return {**names, "seed": self.seed, "overrides": self.overrides}


@dataclass(frozen=True)
class Failure:
    """Failed step of an experiment."""

    phase: str
    run: dict[str, Any]
    error: str


class Experiment:
    """Experiment: a suite with its output directory.

    Args:
        suite: Suite to run.
        out: Local output directory.
        raw: Directory that paths of data and logs are relative to.
        jobs: Number of concurrent commands.
        log: Called with lines of progress.
        run_command: Runner of commands; by default :class:`CommandRunner`.
        command: Command line, for the results.

    Raises:
        ConfigError: ``jobs`` < 1.
        UserError: ``out`` is not writable, or not local.
    """

    def __init__(
        self,
        suite: Suite,
        out: str,
        raw: str = ".",
        jobs: int = 1,
        log: Callable[[str], None] = print,
        run_command: RunCommand | None = None,
        command: str = "",
    ) -> None:
        if jobs < 1:
            raise ConfigError(f"--jobs {jobs} must be at least 1")
        if not paths.is_local(out):
            raise UserError(f"{out}: must be a local directory")
        paths.ensure_writable_dir(out)
        self.suite, self.out, self.raw, self.jobs, self.log = suite, out, raw, jobs, log
        self.machine, self.command = collect_env(select_device("auto")), command
        self.command_runner = CommandRunner()
        self.run_command = self.command_runner if run_command is None else run_command
        self.failures: list[Failure] = []

    def run(self) -> dict[str, Any]:
        """Run all missing steps and return the content of ``results.json``."""
        with sigterm_as_keyboard_interrupt(), locked_output(self.out, "experiment"):
            self.failures = []
            data = self._datasets()
            trials = self._trials(data)
            self._run_all("tuning", self._train, [run for runs in trials.values() for run in runs])
            best_settings = self._select_best(trials)
            runs = [
                self._run(
                    dataset,
                    data[dataset.name],
                    model,
                    seed,
                    best_settings[dataset.name][model.ablation_of or model.name],
                )
                for dataset in self.suite.datasets
                for model in self.suite.models_for(dataset)
                for seed in self.suite.seeds
                if (model.ablation_of or model.name) in best_settings.get(dataset.name, {})
            ]
            self._run_all("training", self._train, runs)
            self._run_all("test", self._test, [run for run in runs if self._exists(run, RECORD_FILE)])
        results = {
            "suite": asdict(self.suite),
            "machine": self.machine,
            "command": self.command,
            "best_settings": best_settings,
            "trials": [self._record(run) for runs in trials.values() for run in runs if self._exists(run, RECORD_FILE)],
            "runs": [self._record(run) for run in runs if self._exists(run, TEST_FILE)],
            "failed": [vars(failure) for failure in self.failures],
        }
        self._write(RESULTS_FILE, results)
        return results

    def _datasets(self) -> dict[str, PreparedDataset]:
        """Return the datasets by name, after preparing missing ones one at a time."""
        prepared = {}
        for dataset in self.suite.datasets:
            try:
                folder = prepare_dataset(dataset, self.raw, self.out, self._command, self.log)
                prepared[dataset.name] = PreparedDataset(folder, DatasetCard.load(folder).without_command())
            except UserError as error:
                self._record_failure("data", {"dataset": dataset.name}, dataset.name, error)
        return prepared

    def _trials(self, data: dict[str, PreparedDataset]) -> dict[tuple[str, str], list[Run]]:
        """Return trials by dataset and model; empty for a model without tuning."""
        seed = self.suite.seeds[0]
        return {
            (dataset.name, model.name): [
                self._run(dataset, data[dataset.name], model, seed, trial) for trial in self.suite.trials(model)
            ]
            for dataset in self.suite.datasets
            for model in self.suite.models
            if dataset.name in data and not model.ablation_of
        }

    def _select_best(self, trials: dict[tuple[str, str], list[Run]]) -> dict[str, dict[str, Overrides]]:
        """Select the best settings by dataset and model; a model without a finished trial is left out."""
        best_settings: dict[str, dict[str, Overrides]] = {}
        for (dataset, model), runs in trials.items():
            of_dataset = best_settings.setdefault(dataset, {})
            finished = [run for run in runs if self._exists(run, RECORD_FILE)]
            if not runs:
                of_dataset[model] = {}
            elif finished:
                best = max(finished, key=self._score)
                overrides = best.overrides
                of_dataset[model] = {name: overrides[name] for name in overrides if name not in best.model.overrides}
        self._write(BEST_SETTINGS_FILE, best_settings)
        return best_settings

    def _score(self, run: Run) -> float:
        assert self.suite.tuning is not None
        metrics, select = self._record(run)["validation"], self.suite.tuning.select
        return float(metrics["auc"]) if select == "auc" and "auc" in metrics else -float(metrics["loss"])

    def _run(self, dataset: Dataset, data: PreparedDataset, model: Model, seed: int, tuned: Overrides) -> Run:
        overrides = tuned | model.overrides  # an ablation may override tuned settings
        settings = merge_overrides(dataset.settings, overrides | {"train.seed": seed})
        config = config_from_dict(settings)
        text = json.dumps(
            [asdict(config), data.card], sort_keys=True, default=str
        )  # includes defaults, which may change with the code
        parts = (dataset.name, model.name.replace(" ", "-"), f"seed-{seed}-{hex_digest(text, 8)}")
        folder = paths.join(self.out, "runs", *parts)
        return Run(dataset.name, data.folder, model, seed, overrides, settings, config, folder)

    def _run_all(self, phase: str, work: Callable[[Run], str], runs: Sequence[Run]) -> None:
        """Process runs concurrently; a failure is recorded and does not stop other runs."""
        runs = list({run.folder: run for run in runs}.values())  # the best trial is also the run of the first seed
        result_file = RECORD_FILE if phase != "test" else TEST_FILE
        remaining = [run for run in runs if not self._exists(run, result_file)]
        if not remaining:
            return
        done = len(runs) - len(remaining)
        reused = f", {done} already done" if done else ""
        self.log(f"{phase}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}{reused}")
        count = iter(range(done + 1, len(runs) + 1))

        def attempt(run: Run) -> None:
            try:
                line = work(run)
            except UserError as error:
                if not self.command_runner.stopped:  # otherwise it was stopped, not failed
                    self._record_failure(phase, run.identity() | {"folder": self._relative(run)}, run.title, error)
            else:
                self.log(f"[{next(count)}/{len(runs)}] {run.title}: {line}")

        if self.jobs == 1:
            for run in remaining:
                attempt(run)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(attempt, run) for run in remaining]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.command_runner.stop()
                raise

    def _train(self, run: Run) -> str:
        paths.ensure_writable_dir(run.folder)
        file = paths.join(run.folder, "settings.yaml")
        paths.write_text(file, yaml.safe_dump(run.settings, sort_keys=False))
        resumed = paths.exists(RunDir(run.folder).checkpoints)
        start = time.monotonic()
        command = ["train", "--config", file, "--data", run.data, "--run", run.folder]
        self._command(command, paths.join(run.folder, "log.txt"))
        seconds = time.monotonic() - start
        summary = summarize_run(run.folder, run.config) | {"seconds": round(seconds, 1), "resumed": resumed}
        record = run.identity() | summary | {"jobs": self.jobs, "machine": self.machine}
        paths.write_text(paths.join(run.folder, RECORD_FILE), json.dumps(record, indent=1) + "\n")
        metrics = summary["validation"]
        return f"validation AUC {metrics['auc']:.4f}, loss {metrics['loss']:.4f}, {seconds:.0f} s{_tuned_settings(run)}"

    def _test(self, run: Run) -> str:
        # `a2gen evaluate` writes predictions before the result, whose presence marks the test as finished.
        result, predictions = (paths.join(run.folder, name) for name in (TEST_FILE, PREDICTIONS_FILE))
        config = run.config
        command = ["evaluate", "--run", run.folder, "--data", run.data, "--split", "test"]
        command += ["--json", result, "--predictions", predictions, "--device", config.train.device]
        settings = vars(config.evaluate) | {
            "num_top_sequences": config.evaluate.num_top_sequences or DEFAULT_NUM_SEQUENCES
        }
        self._command([*command, *cli_arguments(settings)], paths.join(run.folder, "log.txt"))
        aucs = [row["auc"] for row in json.loads(paths.read_text(result))["actions"].values() if row["auc"] is not None]
        return f"test AUC {sum(aucs) / max(len(aucs), 1):.4f}"

    def _command(self, arguments: Sequence[str], log: str) -> None:
        check_command(self.run_command, arguments, log)

    def _record(self, run: Run) -> dict[str, Any]:
        """Return the record of a finished run, with files relative to the output directory."""
        record: dict[str, Any] = json.loads(paths.read_text(paths.join(run.folder, RECORD_FILE)))
        folder = self._relative(run)
        files = {"folder": folder}
        if self._exists(run, TEST_FILE):
            files |= {"test": f"{folder}/{TEST_FILE}", "predictions": f"{folder}/{PREDICTIONS_FILE}"}
        return {**record, **files}

    def _relative(self, run: Run) -> str:
        return run.folder.removeprefix(self.out).lstrip("/")

    def _exists(self, run: Run, file: str) -> bool:
        return paths.exists(paths.join(run.folder, file))

    def _record_failure(self, phase: str, run: dict[str, Any], title: str, error: UserError) -> None:
        reason = " ".join(str(error).split())
        self.failures.append(Failure(phase, run, reason))
        self.log(f"{phase} of {title} failed: {reason}")

    def _write(self, name: str, content: Any) -> None:
        paths.write_text(paths.join(self.out, name), json.dumps(content, indent=1) + "\n")


def _tuned_settings(run: Run) -> str:
    tuned = [f"{name} {value}" for name, value in run.overrides.items() if name not in run.model.overrides]
    return f" ({', '.join(tuned)})" if tuned else ""
