"""Running a suite: tune every model, train what was chosen with every seed, then test.

::

    OUT/data/jd/                                dataset made of a raw log, if the suite names one; jd.json says how
    OUT/runs/jd/ple/seed-0-1a2b3c4d/            a run: settings.yaml, log.txt, checkpoints; when it is finished
        record.json                             its validation, size and speed
        test.json, test.parquet                 its evaluation and predictions, if it was chosen
    OUT/best_settings.json                      what tuning chose, written before anything is tested
    OUT/results.json                            all of it

A run's folder is named after its seed and a digest of its settings, defaults too, and dataset: whatever a suite asks
for that is there already is not done again, and what was begun is resumed. That other code would train it otherwise is
not noticed, but its record has the commit. The test split is read in the last phase only, once
all that depends on validation is decided.
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from a2gen_rec.config import Config
from a2gen_rec.config.parse import config_from_dict
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.experiments.command_runner import CommandRunner, sigterm_as_keyboard_interrupt
from a2gen_rec.experiments.records import summarize_run
from a2gen_rec.experiments.suite import Dataset, Model, Overrides, Suite, merge_overrides
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import select_device
from a2gen_rec.utils.environment import collect_env

RunCommand = Callable[[Sequence[str], str], int]
"""Runs ``a2gen`` with arguments, its output at the end of a file, to an exit code."""

BEST_SETTINGS_FILE, RESULTS_FILE = "best_settings.json", "results.json"
DEFAULT_NUM_SEQUENCES = 12  # that a test looks at, unless its settings say
RECORD_FILE, TEST_FILE, PREDICTIONS_FILE = "record.json", "test.json", "test.parquet"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        overrides: what its settings differ in from the dataset's, but for the seed.
        settings: all of them, nested as in a file; config: the same, checked.
        folder: where it is kept.
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
        return f"{self.dataset} · {self.model.name}, seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        """What tells it apart, for the results."""
        names = {"dataset": self.dataset, "model": self.model.name, "ablation_of": self.model.ablation_of or None}
        return {**names, "seed": self.seed, "overrides": self.overrides}


@dataclass(frozen=True)
class PreparedDataset:
    """A dataset's folder, and its card without the command that made it: what tells it from others."""

    folder: str
    card: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """What could not be done, and why."""

    phase: str
    run: dict[str, Any]
    error: str


class Experiment:
    """A suite in a folder.

    Args:
        out: local folder of everything that is made; raw: folder that the suite's data and logs are relative to.
        jobs: commands run at a time.
        tell: takes lines of progress; launch: see ``Launch``, by default processes of their own.
        command: what was typed, for the results.

    Raises:
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
            raise UserError(f"{out}: must be a local folder")
        paths.ensure_writable_dir(out)
        self.suite, self.out, self.raw, self.jobs, self.log = suite, out, raw, jobs, log
        self.machine, self.command = collect_env(select_device("auto")), command
        self.command_runner = CommandRunner()
        self.run_command = self.command_runner if run_command is None else run_command
        self.failures: list[Failure] = []

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns what ``results.json`` holds."""
        with sigterm_as_keyboard_interrupt(), self._lock():
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

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Two experiments in one folder would train the same runs, and each overwrite what the other has found."""
        with Path(self.out, "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
            except OSError as error:
                raise UserError(f"{self.out}: another `a2gen experiment` is at work here") from error
            yield

    def _datasets(self) -> dict[str, PreparedDataset]:
        """The datasets; those that are not there are made, one at a time."""
        found = {}
        for dataset in self.suite.datasets:
            try:
                folder = self._dataset(dataset)
                card = DatasetCard.load(folder).to_dict()
                found[dataset.name] = PreparedDataset(folder, {name: card[name] for name in card if name != "command"})
            except UserError as error:
                self._record_failure("data", {"dataset": dataset.name}, dataset.name, error)
        return found

    def _dataset(self, dataset: Dataset) -> str:
        if dataset.data:
            return paths.abspath(paths.resolve_relative(self.raw, dataset.data))
        folder = paths.abspath(paths.join(self.out, "data", dataset.name))
        how, asked = f"{folder}.json", json.dumps(dataset.preparation, indent=1, default=str) + "\n"
        if paths.exists(folder):
            if paths.exists(how) and paths.read_text(how) != asked:
                raise UserError(f"{folder}: was made otherwise, as {how} has it; remove both, or give another --out")
            return folder
        paths.ensure_writable_dir(paths.dirname(folder))
        paths.write_text(how, asked)
        log, source, raw = f"{folder}.txt", dataset.source, paths.resolve_relative(self.raw, dataset.raw)
        if dataset.simulate is not None:
            source, raw = "simulated", f"{folder}-log"
            if not paths.exists(raw):
                self._command(["simulate", "--out", raw, *_cli_arguments(dataset.simulate)], log)
        spec = ["--spec", dataset.spec] if dataset.spec else []
        self.log(f"preparing {dataset.name}")
        self._command(["prepare", source, "--raw", raw, "--out", folder, *spec, *_cli_arguments(dataset.prepare)], log)
        return folder

    def _trials(self, data: dict[str, PreparedDataset]) -> dict[tuple[str, str], list[Run]]:
        """By dataset and model; an ablation has none, and without tuning nor has a model."""
        seed = self.suite.seeds[0]
        return {
            (dataset.name, model.name): [
                self._run(dataset, data[dataset.name], model, seed, tried) for tried in self.suite.trials(model)
            ]
            for dataset in self.suite.datasets
            for model in self.suite.models
            if dataset.name in data and not model.ablation_of
        }

    def _select_best(self, trials: dict[tuple[str, str], list[Run]]) -> dict[str, dict[str, Overrides]]:
        """What was best on validation, by dataset and model; nothing where no trial came to its end."""
        chosen: dict[str, dict[str, Overrides]] = {}
        for (dataset, model), runs in trials.items():
            of = chosen.setdefault(dataset, {})
            done = [run for run in runs if self._exists(run, RECORD_FILE)]
            if not runs:
                of[model] = {}
            elif done:
                best = max(done, key=self._score)
                of[model] = {name: best.overrides[name] for name in best.overrides if name not in best.model.overrides}
        self._write(BEST_SETTINGS_FILE, chosen)
        return chosen

    def _score(self, run: Run) -> float:
        assert self.suite.tuning is not None
        metrics, select = self._record(run)["validation"], self.suite.tuning.select
        return float(metrics[select]) if select == "auc" else -float(metrics[select])

    def _run(self, dataset: Dataset, data: PreparedDataset, model: Model, seed: int, tuned: Overrides) -> Run:
        overrides = tuned | model.overrides  # an ablation of what was tuned is one
        settings = merge_overrides(dataset.settings, overrides | {"train.seed": seed})
        config = config_from_dict(settings)
        text = json.dumps([asdict(config), data.card], sort_keys=True, default=str)  # defaults change with the code
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        place = (dataset.name, model.name.replace(" ", "-"), f"seed-{seed}-{digest}")
        folder = paths.join(self.out, "runs", *place)
        return Run(dataset.name, data.folder, model, seed, overrides, settings, config, folder)

    def _run_all(self, phase: str, work: Callable[[Run], str], runs: Sequence[Run]) -> None:
        """Work through runs, several at a time; one that fails is noted and stops no other."""
        runs = list({run.folder: run for run in runs}.values())  # a chosen trial is the first seed's run
        done = RECORD_FILE if phase != "test" else TEST_FILE
        left = [run for run in runs if not self._exists(run, done)]
        if not left:
            return
        kept = f", {len(runs) - len(left)} of them done before" if len(left) < len(runs) else ""
        self.log(f"{phase}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}{kept}")
        count = iter(range(len(runs) - len(left) + 1, len(runs) + 1))

        def attempt(run: Run) -> None:
            try:
                line = work(run)
            except UserError as error:
                if not self.command_runner.stopped:  # else it was stopped, and did not fail
                    self._record_failure(phase, run.identity() | {"folder": self._relative(run)}, run.title, error)
            else:
                self.log(f"[{next(count)}/{len(runs)}] {run.title}: {line}")

        if self.jobs == 1:
            for run in left:
                attempt(run)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            started = [pool.submit(attempt, run) for run in left]
            try:
                for each in as_completed(started):
                    each.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.command_runner.stop()
                raise

    def _train(self, run: Run) -> str:
        paths.ensure_writable_dir(run.folder)
        file = paths.join(run.folder, "settings.yaml")
        paths.write_text(file, yaml.safe_dump(run.settings, sort_keys=False))
        resumed = paths.exists(RunDir(run.folder).checkpoints)
        began = time.monotonic()
        command = ["train", "--config", file, "--data", run.data, "--run", run.folder]
        self._command(command, paths.join(run.folder, "log.txt"))
        seconds = time.monotonic() - began
        facts = summarize_run(run.folder, run.config) | {"seconds": round(seconds, 1), "resumed": resumed}
        record = run.identity() | facts | {"jobs": self.jobs, "machine": self.machine}
        paths.write_text(paths.join(run.folder, RECORD_FILE), json.dumps(record, indent=1) + "\n")
        metrics = facts["validation"]
        return f"validation AUC {metrics['auc']:.4f}, loss {metrics['loss']:.4f}, {seconds:.0f} s{_tuned_settings(run)}"

    def _test(self, run: Run) -> str:
        # The predictions are written first: a result without them would be taken for finished.
        result, predictions = (paths.join(run.folder, name) for name in (TEST_FILE, PREDICTIONS_FILE))
        config = run.config
        command = ["evaluate", "--run", run.folder, "--data", run.data, "--split", "test"]
        command += ["--json", result, "--predictions", predictions, "--device", config.train.device]
        settings = vars(config.evaluate) | {
            "num_top_sequences": config.evaluate.num_top_sequences or DEFAULT_NUM_SEQUENCES
        }
        self._command([*command, *_cli_arguments(settings)], paths.join(run.folder, "log.txt"))
        aucs = [row["auc"] for row in json.loads(paths.read_text(result))["actions"].values() if row["auc"] is not None]
        return f"test AUC {sum(aucs) / max(len(aucs), 1):.4f}"

    def _command(self, arguments: Sequence[str], log: str) -> None:
        """Run a command of `a2gen`.

        Raises:
            UserError: it failed, with the last line it left.
        """
        code = self.run_command(arguments, log)
        if code:
            lines = [line.strip() for line in paths.read_text(log).splitlines() if line.strip()]
            last = lines[-1].removeprefix("a2gen: error: ") if lines else "it said nothing"
            raise UserError(f"a2gen {arguments[0]} ended with exit code {code}: {last}; see {log}")

    def _record(self, run: Run) -> dict[str, Any]:
        """What is known of a finished run, with files relative to the experiment's folder."""
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


def _cli_arguments(settings: Mapping[str, Any]) -> Iterable[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def _tuned_settings(run: Run) -> str:
    tuned = [f"{name} {value}" for name, value in run.overrides.items() if name not in run.model.overrides]
    return f" ({', '.join(tuned)})" if tuned else ""
