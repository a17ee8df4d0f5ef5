"""Training, saving and loading of a run's ensemble, and guarantees of the trained ensemble."""

import copy
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.cli.main import main
from a2gen_rec.config import EnsembleConfig, EvaluateConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.ensemble import fit
from a2gen_rec.ensemble.fit import TrainedEnsemble, default_ensemble_dir, train_ensemble
from a2gen_rec.ensemble.fit_baselines import build_untrained
from a2gen_rec.ensemble.session_lists import mean_std
from a2gen_rec.ensemble.trainer import EpochResult, max_monotonicity_violations, score_lists
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble.baselines import PowerFormula
from a2gen_rec.models.ensemble.io import load_baseline, load_ensemble, save_ensemble
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.runs import evaluate as evaluation
from a2gen_rec.runs.evaluate import evaluate_run
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import build_training_model
from a2gen_rec.training.entrypoint import train
from a2gen_rec.training.loaded_run import LoadedRun, load_run, restore_config
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.cards import make_card, short_training, write_dataset
from tests.helpers.distributed import on_ranks
from tests.helpers.properties import examples

pytestmark = pytest.mark.training

CARD = make_card()
CONFIG = EnsembleConfig(
    epochs=3,
    lr=0.05,
    dim=4,
    hidden_dims=[6, 4],
    quadrature_degree=16,
    batch_size=16,
    max_history_events=3,
    formula_trials=8,
    session_gap_s=1e6,
)
SINGLE = ["like", "comment", "follow", "click", "glance", "effective", "watch_time"]
BASELINES = ["formula", "logistic regression", "MLP", "session weights"]


class RecordingCallback:
    """Progress callback that records its calls."""

    def __init__(self) -> None:
        self.scored: list[tuple[str, int, int]] = []
        self.fitted: list[str] = []
        self.epochs: list[tuple[str, int]] = []

    def on_scoring(self, split: str, done: int, files: int) -> None:
        self.scored.append((split, done, files))

    def on_fit_start(self, name: str) -> None:
        self.fitted.append(name)

    def on_epoch_end(self, name: str, epoch: EpochResult) -> None:
        self.epochs.append((name, epoch.epoch))


@dataclass(frozen=True, repr=False)
class EnsembleRun:
    data: Path
    run: Path
    trained: TrainedEnsemble
    progress: RecordingCallback

    @property
    def folder(self) -> Path:
        return self.run / "ensemble"


@pytest.fixture(scope="module")
def ensemble_run(tmp_path_factory: pytest.TempPathFactory) -> EnsembleRun:
    folder = tmp_path_factory.mktemp("ensemble_run")
    data, run, progress = write_dataset(folder / "data", CARD, windows=40, files=2), folder / "run", RecordingCallback()
    config = short_training(6, predict_objectives=True)
    config.optim.dense_lr, config.optim.sparse_lr, config.evaluate.max_unexplored_mass = 0.05, 0.3, 0.01
    config.loader.max_impressions_per_batch = 60
    train(config, str(data), str(run))
    trained = train_ensemble(str(run), str(run / "ensemble"), CONFIG, progress)
    assert trained is not None
    return EnsembleRun(data, run, trained, progress)


def measured(ensemble_run: EnsembleRun, split: str = "valid", **options: str) -> dict[str, Any]:
    return evaluate_run(str(ensemble_run.run), split, "", EvaluateConfig(max_unexplored_mass=0.5), **options)


def test_loads_the_trained_ensemble(ensemble_run: EnsembleRun) -> None:
    model, card = load_ensemble(str(ensemble_run.folder))
    assert card == ensemble_run.trained.card
    assert [objective.name for objective in card.objectives] == SINGLE
    assert {objective.name for objective in card.objectives if not objective.higher_is_better} == {"glance"}
    assert (card.step, card.run) == (6, str(ensemble_run.run))
    assert list(card.max_monotonicity_violation) == SINGLE
    lists = ensemble_run.trained.valid
    np.testing.assert_array_equal(score_lists(model, lists), score_lists(ensemble_run.trained.model, lists))
    assert ensemble_run.progress.fitted == ["UMRE", "logistic regression", "MLP", "session weights", "formula"]
    assert [epoch for name, epoch in ensemble_run.progress.epochs if name == "UMRE"] == [0, 1, 2]
    assert ensemble_run.progress.scored == [(split, done, 2) for split in ("train", "valid") for done in range(3)]


def test_loaded_ensemble_and_baselines_reproduce_reported_metrics(ensemble_run: EnsembleRun) -> None:
    """On the same lists, all metrics are exactly equal, including those of the baselines."""
    result = measured(ensemble_run)
    assert result["targets"] == len(ensemble_run.trained.valid.item)
    assert result["lists"] == ensemble_run.trained.card.metrics
    assert list(result["lists"]["methods"]) == ["UMRE", *(f"{name} alone" for name in SINGLE), *BASELINES]
    assert result["lists"]["lists"] > 20
    assert set(result["lists"]["behaviors"]) == {"like", "comment", "follow", "click", "effective"}
    other = measured(ensemble_run, "test")
    assert other["lists"]["split"] == "test"
    assert other["lists"]["methods"] != result["lists"]["methods"]


def test_baselines_are_saved_with_their_parameters(ensemble_run: EnsembleRun) -> None:
    """Loaded baselines differ from untrained ones."""
    card, lists = ensemble_run.trained.card, ensemble_run.trained.valid
    for name in BASELINES:
        fresh = build_untrained(card)[name]
        before = score_lists(fresh, lists)
        load_baseline(str(ensemble_run.folder), name.replace(" ", "-").lower(), fresh)
        assert not np.allclose(score_lists(fresh, lists), before), name


def test_formula_normalizes_watch_times_only(ensemble_run: EnsembleRun) -> None:
    formula = build_untrained(ensemble_run.trained.card)["formula"]
    load_baseline(str(ensemble_run.folder), "formula", formula)
    mean, std = mean_std(ensemble_run.trained.train)
    assert isinstance(formula, PowerFormula)
    assert formula.mean.tolist() == [0.0] * 6 + [mean[6].item()]
    assert formula.scale.tolist() == [1.0] * 6 + [std[6].item()]


def test_evaluation_without_ensemble_has_no_list_metrics(
    ensemble_run: EnsembleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(ensemble_run.folder, moved)
    monkeypatch.setattr(RunDir, "ensemble", property(lambda run_dir: f"{run_dir.path}/absent"))
    assert default_ensemble_dir(str(ensemble_run.run)) == ""
    assert measured(ensemble_run)["lists"] == {}
    assert measured(ensemble_run, ensemble=str(moved))["lists"] == ensemble_run.trained.card.metrics


def refused(ensemble_run: EnsembleRun, folder: Path, message: str) -> None:
    """Assert a one-line error before the evaluation of the split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("too late"))
        with pytest.raises(UserError, match=message) as caught:
            measured(ensemble_run, ensemble=str(folder))
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


def test_rejects_incompatible_ensembles(ensemble_run: EnsembleRun, tmp_path: Path) -> None:
    """Another step, other directions, or another run."""
    model, card = load_ensemble(str(ensemble_run.folder))
    refused(ensemble_run, tmp_path / "none", "none: directory not found")
    (tmp_path / "empty").mkdir()
    refused(ensemble_run, tmp_path / "empty", "empty: not an ensemble directory")
    save_ensemble(str(tmp_path / "step"), model, replace(card, step=4))
    refused(
        ensemble_run,
        tmp_path / "step",
        r"step: ensemble was trained on step 4 of .*run, best checkpoint is step 6; run `a2gen ensemble train",
    )
    liked = [replace(objective, higher_is_better=True) for objective in card.objectives]
    save_ensemble(str(tmp_path / "better"), model, replace(card, objectives=liked))
    refused(ensemble_run, tmp_path / "better", "better: ensemble was trained on .*run, which has different outputs")
    save_ensemble(str(tmp_path / "again"), model, replace(card, checkpoint="0" * 12, run="runs/other"))
    refused(ensemble_run, tmp_path / "again", "again: ensemble belongs to another run, runs/other; run")


def test_fingerprint_identifies_a_checkpoint(ensemble_run: EnsembleRun, tmp_path: Path) -> None:
    """It differs from a checkpoint of the same command, and is independent of path and ``state.json``."""
    original = checkpoint.best(str(ensemble_run.run))
    moved = shutil.copytree(original, tmp_path / "moved")
    (moved / "state.json").write_text("{}")
    assert (
        checkpoint.fingerprint(str(moved)) == checkpoint.fingerprint(original) == ensemble_run.trained.card.checkpoint
    )
    with load_run(str(ensemble_run.run)) as loaded:
        state = checkpoint.TrainState.read(original)
        checkpoint.save(str(tmp_path / "run"), loaded.model, state, keep_latest_k=0)
    again = checkpoint.fingerprint(checkpoint.best(str(tmp_path / "run")))
    assert again != ensemble_run.trained.card.checkpoint
    (moved / ".metadata").unlink()
    with pytest.raises(UserError, match=r"moved/.metadata: cannot be read .No such file"):
        checkpoint.fingerprint(str(moved))


def _to_compare(process: DistributedContext, run: Path, folder: Path) -> str:
    """Return the error of one rank."""
    state = checkpoint.TrainState.read(path := checkpoint.best(str(run)))
    config = restore_config(state.config)
    built = build_training_model(CARD, config, process)
    checkpoint.load(path, built, with_optimizer=False)
    loaded = LoadedRun(built, config, CARD, state.data, process, state.step, checkpoint.fingerprint(path))
    try:
        evaluation.load_list_comparison(loaded, str(run), str(folder), "valid")
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_report_a_missing_baseline(ensemble_run: EnsembleRun, tmp_path: Path) -> None:
    """No rank waits for rank 0, which reads the file."""
    folder = Path(shutil.copytree(ensemble_run.folder, tmp_path / "ensemble"))
    (folder / "baseline-mlp.safetensors").unlink()
    first, second = on_ranks(2, tmp_path, _to_compare, ensemble_run.run, folder)
    assert first == second == f"{folder}/baseline-mlp.safetensors: not found"


def test_list_metrics_are_computed_outside_the_process_group(
    ensemble_run: EnsembleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = fit.measure_methods

    def measured_alone(*args: Any) -> dict[str, Any]:
        assert not torch.distributed.is_initialized()
        return measure(*args)

    monkeypatch.setattr(evaluation, "measure_methods", measured_alone)
    assert measured(ensemble_run)["lists"] == ensemble_run.trained.card.metrics


def test_rejects_invalid_training_before_scoring(ensemble_run: EnsembleRun, tmp_path: Path) -> None:
    def fails(error: type[UserError], message: str, out: Path, config: EnsembleConfig = CONFIG) -> None:
        progress = RecordingCallback()
        with pytest.raises(error, match=message) as caught:
            train_ensemble(str(ensemble_run.run), str(out), config, progress)
        assert "\n" not in str(caught.value)
        assert not progress.scored

    fails(
        ConfigError,
        "behavior_weights.likes: unknown behavior; choose from like, comment",
        tmp_path,
        replace(CONFIG, behavior_weights={"likes": 1}),
    )
    too_large = replace(CONFIG, weighting="pareto_efficient", min_weight=0.6)
    fails(ConfigError, r"ensemble.min_weight 0.6 must be at most 1 / \d+: ", tmp_path, too_large)
    fails(ConfigError, "behavior_weights.glance: ", tmp_path, replace(CONFIG, behavior_weights={"glance": 1}))
    (tmp_path / "mine").write_text("")
    fails(UserError, "exists but is not an ensemble directory", tmp_path)
    fails(UserError, "mine: cannot write the ensemble .Not a dir", tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_cached_scores_depend_on_the_dataset(ensemble_run: EnsembleRun, tmp_path: Path) -> None:
    """Scores of another dataset are cached next to those of the first; cached scores are reused."""
    scored = ensemble_run.run / "scores"
    existing = {path.name for path in scored.iterdir()}
    assert measured(ensemble_run)["lists"] == ensemble_run.trained.card.metrics
    assert {path.name for path in scored.iterdir()} == existing
    other = write_dataset(tmp_path / "other", CARD, windows=30, files=1, seed=1)
    result = evaluate_run(str(ensemble_run.run), "valid", str(other), EvaluateConfig(max_unexplored_mass=0.5))
    assert result["lists"]["lists"] > 10
    assert result["lists"]["methods"] != ensemble_run.trained.card.metrics["methods"]
    (new_dir,) = {path.name for path in scored.iterdir()} - existing
    assert re.fullmatch(r"step-00000006-[0-9a-f]{12}", new_dir)
    again = evaluate_run(str(ensemble_run.run), "valid", str(other), EvaluateConfig(max_unexplored_mass=0.5))
    assert again == result
    new_dataset = write_dataset(tmp_path / "prepared_again" / "other", CARD, windows=30, files=1, seed=2)
    shutil.rmtree(other)
    new_dataset.rename(other)
    assert DatasetCard.load(str(other)).splits == CARD.splits, "only the digest shows that the data differ"
    renewed = evaluate_run(str(ensemble_run.run), "valid", str(other), EvaluateConfig(max_unexplored_mass=0.5))
    assert renewed["lists"]["methods"] != result["lists"]["methods"]
    assert len({renewed["data_digest"], result["data_digest"], result["training_data_digest"]}) == 3
    replace(CARD, objectives=["glance"]).save(str(other))
    with pytest.raises(UserError, match="other: objectives differ from those of run"):
        train_ensemble(str(ensemble_run.run), str(tmp_path / "out"), CONFIG, RecordingCallback(), str(other))


def test_cached_scores_depend_on_the_settings(ensemble_run: EnsembleRun) -> None:
    folders = []
    with load_run(str(ensemble_run.run)) as loaded, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "score_session_lists", lambda *args: folders.append(args[2]))
        variants = [
            (loaded, CONFIG),
            (loaded, replace(CONFIG, epochs=9)),
            (loaded, replace(CONFIG, max_history_events=2)),
        ]
        variants += [(loaded, replace(CONFIG, session_gap_s=7.0)), (replace(loaded, fingerprint="0" * 12), CONFIG)]
        bounded = copy.deepcopy(loaded.config)
        bounded.evaluate.max_unexplored_mass = 0.5
        for variant, config in [*variants, (replace(loaded, config=bounded), CONFIG)]:
            fit.cached_session_lists(variant, str(ensemble_run.run), "valid", config)
        patch.setattr(fit, "SCORES_FORMAT_VERSION", 0)
        fit.cached_session_lists(loaded, str(ensemble_run.run), "valid", CONFIG)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 6


def test_failed_training_keeps_the_previous_ensemble(
    ensemble_run: EnsembleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(ensemble_run.folder, tmp_path / "ensemble"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fails(*_: Any, **__: Any) -> None:
        raise UserError("the loss became nan")

    monkeypatch.setattr(fit, "fit_baselines", fails)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(UserError, match="became nan"):
            train_ensemble(str(ensemble_run.run), str(folder), CONFIG, RecordingCallback())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble"]


def test_reports_monotonicity_violations_and_a_failed_chart(
    ensemble_run: EnsembleRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset has no user table for the chart; the ensemble is reported before that error."""
    falls = dict.fromkeys(SINGLE, 0.0) | {"glance": 2.5e-4, "like": 9e-7}
    with_violations = replace(
        ensemble_run.trained, card=replace(ensemble_run.trained.card, max_monotonicity_violation=falls)
    )
    monkeypatch.setattr(fit, "train_ensemble", lambda *_: with_violations)
    with pytest.raises(SystemExit) as left:
        main(["ensemble", "train", "--run", str(ensemble_run.run)])
    output = capsys.readouterr()
    assert left.value.code == 1
    assert output.out.splitlines()[-2:] == [
        "the transform of glance decreases by up to 2.5e-04: decrease lr or increase quadrature_degree",
        f"ensemble: {ensemble_run.folder}",
    ]
    assert "decrease lr" not in "\n".join(output.out.splitlines()[:-2])
    (line,) = output.err.splitlines()
    assert line.startswith(f"a2gen: error: {ensemble_run.data}/users.parquet: cannot be read")


def test_card_is_plain_yaml(ensemble_run: EnsembleRun) -> None:
    raw = yaml.safe_load((ensemble_run.folder / "ensemble.yaml").read_text())
    assert sum(raw["behavior_weights"].values()) == pytest.approx(1)
    assert raw["config"]["hidden_dims"] == [6, 4]


# --- guarantees of the trained ensemble on its training and validation lists -------------------------------------


@pytest.fixture(scope="module")
def exact(ensemble_run: EnsembleRun) -> Ensemble:
    """Ensemble in float64, in which guarantees hold up to rounding."""
    assert max_monotonicity_violations(ensemble_run.trained.model, ensemble_run.trained.train).max() == 0
    return copy.deepcopy(ensemble_run.trained.model).double()


def scored(exact: Ensemble, ensemble_run: EnsembleRun, row: int, z: torch.Tensor) -> torch.Tensor:
    """Return scores of standardized predictions [C, K] in the first context of a validation list."""
    batch = ensemble_run.trained.valid.batch(np.array([row % len(ensemble_run.trained.valid)]))
    value = exact.mean + exact.scale * z.double()
    return exact(value[None], batch.events, batch.length, batch.context[:, :1]).score[0].detach()


VALUES = st.floats(-30, 30, width=32)
ROWS = st.integers(0, 10_000)


@examples(150)
@given(ROWS, st.lists(VALUES, min_size=7, max_size=7), st.integers(0, 6), st.floats(0, 32, width=32))
def test_improving_an_objective_never_lowers_the_score(
    ensemble_run: EnsembleRun, exact: Ensemble, row: int, values: list[float], k: int, step: float
) -> None:
    value = torch.tensor([values, values])
    lower_is_better = not ensemble_run.trained.card.objectives[k].higher_is_better
    value[1, k] += -step if lower_is_better else step
    before, after = scored(exact, ensemble_run, row, value)
    assert after >= before - 1e-12 * before.abs()
    if step > 1e-2 and abs(values[k]) < 8:
        assert after > before


@examples(60)
@given(
    ROWS,
    st.lists(VALUES, min_size=7, max_size=7),
    st.integers(0, 6),
    st.lists(st.integers(-40, 40), min_size=1, max_size=8, unique=True),
)
def test_one_objective_determines_the_order_if_others_are_equal(
    ensemble_run: EnsembleRun, exact: Ensemble, row: int, values: list[float], k: int, tenths: list[int]
) -> None:
    value = torch.tensor(values).repeat(len(tenths), 1)
    value[:, k] = torch.tensor(tenths) / 10
    key = torch.tensor(tenths) * (1 if ensemble_run.trained.card.objectives[k].higher_is_better else -1)
    assert scored(exact, ensemble_run, row, value).argsort().tolist() == key.argsort().tolist()


@examples(60)
@given(ROWS, st.sampled_from([-1e4, -16.0, 0.0, 16.0, 1e4]), st.integers(1, 5), st.booleans())
def test_scores_of_extreme_equal_and_single_candidates_and_new_users(
    ensemble_run: EnsembleRun, row: int, value: float, candidates: int, new: bool
) -> None:
    """In float32 as in serving, equal candidates have equal scores and weights sum to 1, for any user."""
    model = ensemble_run.trained.model
    batch = ensemble_run.trained.valid.batch(np.array([row % len(ensemble_run.trained.valid)]))
    events, length = (batch.events[:, :0], batch.length * 0) if new else (batch.events, batch.length)
    context = batch.context[:, :1].expand(-1, candidates, -1)
    with torch.no_grad():
        output = model(torch.full((1, candidates, 7), value), events, length, context)
        alone = model(torch.full((1, 1, 7), value), events, length, batch.context[:, :1])
    assert output.score.isfinite().all()
    torch.testing.assert_close(output.score, alone.score.expand_as(output.score))
    assert (output.weight >= 0).all()
    torch.testing.assert_close(output.weight.sum(-1), torch.ones(1, candidates))
    torch.testing.assert_close((output.weight * output.transform).sum(-1), output.score)
