"""Training of the ensemble on simulated lists, weightings on known cases, and saving."""

import copy
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from a2gen_rec.config import EnsembleConfig
from a2gen_rec.ensemble import trainer
from a2gen_rec.ensemble.losses import combined_relevance, min_norm_weights, pointwise
from a2gen_rec.ensemble.session_lists import SessionLists, mean_std
from a2gen_rec.ensemble.trainer import (
    EpochResult,
    fit,
    fit_ensemble,
    initial_behavior_weights,
    max_monotonicity_violations,
    mean_weight_entropy,
    measure_lists,
    score_lists,
)
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.models.ensemble import io
from a2gen_rec.models.ensemble.baselines import LogisticRegression, SessionWeightedFusion, Standardize
from a2gen_rec.models.ensemble.io import EnsembleCard, load_baseline, load_ensemble, save_ensemble
from a2gen_rec.models.ensemble.model import Ensemble, Objective

pytestmark = pytest.mark.training

OBJECTIVES = [Objective("like"), Objective("glance", False), Objective("watch_time")]
SMALL = EnsembleConfig(lr=0.02, epochs=4, patience=0, batch_size=32, dim=4, hidden_dims=[8, 4], quadrature_degree=8)


def simulated_lists(seed: int, n: int = 600) -> SessionLists:
    """Simulate two user groups, distinguishable by noisy events: one prefers long watch times, the other short ones.

    All users like candidates with a high ``like`` prediction and rarely share those with a low ``glance`` prediction.
    """
    rng = np.random.default_rng(seed)
    length, events_length = rng.integers(4, 13, n), rng.integers(2, 9, n)
    group = rng.choice([-1.0, 1.0], n)
    candidate_group = np.repeat(group, length)
    z = rng.normal(size=(len(candidate_group), 3))
    logits = np.stack([z[:, 0] + 2 * candidate_group * z[:, 2] - 0.5, -z[:, 1] - 2.5], axis=1)
    events = np.repeat(group, events_length)[:, None] + rng.normal(size=(events_length.sum(), 2))
    return SessionLists(
        objectives=("like", "glance", "watch_time"),
        behaviors=("like", "share"),
        user=np.arange(n) // 2,
        ts_ms=np.arange(n),
        length=length,
        events_length=events_length,
        item=np.arange(length.sum()),
        predictions=(z * [0.5, 1.0, 2.0] - [4.0, 1.0, -3.0]).astype(np.float32),
        label=(rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32),
        context=rng.normal(size=(length.sum(), 2)).astype(np.float16),
        events=events.astype(np.float16),
    )


TRAIN, VALID, TEST = simulated_lists(0), simulated_lists(1, 300), simulated_lists(2, 600)


@pytest.fixture(scope="module")
def trained() -> Ensemble:
    return fit_ensemble(OBJECTIVES, TRAIN, VALID, replace(SMALL, epochs=10))[0]


def ndcg(scores: np.ndarray, lists: SessionLists = TEST) -> float:
    value = measure_lists(scores, lists, SMALL.top_k)["ndcg"]
    assert value is not None
    return value


def test_ensemble_beats_every_single_score(trained: Ensemble) -> None:
    """It distinguishes the groups, and its score is monotonic on unseen lists within float32 rounding."""
    ensemble_ndcg = ndcg(score_lists(trained, TEST))
    singles = [ndcg(sign * TEST.predictions[:, k]) for k in range(3) for sign in (1, -1)]
    fixed = ndcg(TEST.predictions[:, 0] / 0.5 - TEST.predictions[:, 1])
    assert ensemble_ndcg > max(*singles, fixed) + 0.03
    assert max_monotonicity_violations(trained, TEST).max() == 0
    batch = TEST.batch(np.arange(100))
    before = trained(batch.predictions, batch.events, batch.length, batch.context)
    slack = 8 * torch.finfo(torch.float32).eps * before.transform.abs().amax(-1)
    for k, step in itertools.product(range(3), (1e-3, 0.5, 30.0)):
        value = batch.predictions.clone()
        value[..., k] += -step if k == 1 else step
        after = trained(value, batch.events, batch.length, batch.context)
        assert (after.score >= before.score - slack).all()
        assert torch.equal(after.weight, before.weight)


def correlated_lists(seed: int, n: int = 300) -> SessionLists:
    """Return lists whose predictions are equally good, with independent errors."""
    lists = simulated_lists(seed, n)
    rng = np.random.default_rng(seed)
    preference = rng.normal(size=(len(lists.item), 1))
    predictions = preference + 0.5 * rng.normal(size=(len(lists.item), 3))
    label = rng.random((len(lists.item), 2)) < 1 / (1 + np.exp(2 - 2 * preference))
    return replace(lists, predictions=predictions.astype(np.float32), label=label.astype(np.float32))


@pytest.mark.parametrize("seed", [0, 1])
def test_equally_good_objectives_share_the_weight(seed: int) -> None:
    """Weights do not concentrate on objectives that only the random seed prefers."""
    train, valid = correlated_lists(3), correlated_lists(4, 100)
    objectives = [replace(objective, higher_is_better=True) for objective in OBJECTIVES]
    model, _ = fit_ensemble(objectives, train, valid, replace(SMALL, epochs=6, seed=seed))
    assert mean_weight_entropy(model, valid) > 0.95
    alone = max(ndcg(valid.predictions[:, k], valid) for k in range(3))
    assert ndcg(score_lists(model, valid), valid) > alone + 0.01


def test_ensemble_orders_by_one_objective_if_others_are_equal(trained: Ensemble) -> None:
    exact, batch = copy.deepcopy(trained).double(), TEST.batch(np.arange(50))
    for k, objective in enumerate(OBJECTIVES):
        value = batch.predictions[:, :1].expand_as(batch.predictions).clone()
        value[..., k] = batch.predictions[..., k]
        score = exact(value, batch.events, batch.length, batch.context[:, :1]).score
        key = value[..., k] * (1 if objective.higher_is_better else -1)
        ahead = key[:, :, None] > key[:, None]
        assert (score[:, :, None] > score[:, None])[ahead].all()


def test_ensemble_scores_extreme_equal_single_and_new_candidates(trained: Ensemble) -> None:
    for value in (torch.zeros(2, 5, 3), torch.full((2, 5, 3), 16.0), torch.full((2, 1, 3), -16.0)):
        context = torch.zeros(2, value.shape[1], 2)
        output = trained(value, torch.zeros(2, 0, 2), torch.zeros(2, dtype=torch.long), context)
        assert output.score.isfinite().all()
        torch.testing.assert_close(output.score, output.score[:1, :1].expand_as(output.score))
        torch.testing.assert_close(output.weight.sum(-1), torch.ones(value.shape[:2]))
        assert (output.weight >= 0).all()


LOSSES = ("pointwise", "listwise", "pairwise")
WEIGHTINGS = ("fixed", "pareto", "min_norm", "pareto_efficient")


@pytest.mark.parametrize(
    ("loss", "weighting"),
    [
        pytest.param(loss, weighting, marks=[] if row == column % 3 else pytest.mark.thorough)
        for row, loss in enumerate(LOSSES)
        for column, weighting in enumerate(WEIGHTINGS)
    ],
)
def test_every_loss_and_weighting_learns(loss: str, weighting: str) -> None:
    config = replace(SMALL, loss=loss, weighting=weighting, reweight_interval=3, min_weight=0.1)  # type: ignore[arg-type]
    values: list[EpochResult] = []
    model, history = fit_ensemble(OBJECTIVES, TRAIN, VALID, config, values.append)
    assert values == history.epochs
    assert len(values) == 4
    assert ndcg(score_lists(model, VALID), VALID) > ndcg(np.zeros(len(VALID.item)), VALID) + 0.1
    for epoch in values:
        assert list(epoch.weights) == ["like", "share"]
        assert sum(epoch.weights.values()) == pytest.approx(1)
        assert min(epoch.weights.values()) >= (0.1 if weighting == "pareto_efficient" else 0)
    assert (values[0].weights == values[-1].weights) is (weighting == "fixed")


def test_baselines_use_the_same_training_loop() -> None:
    """Logistic regression learns common preferences, session weights also those of the groups."""
    standardize = Standardize([False, True, False], *mean_std(TRAIN))
    torch.manual_seed(0)
    scores = []
    for model in (LogisticRegression(standardize), SessionWeightedFusion(standardize, 2, 2, dim=4)):
        before = ndcg(score_lists(model, TEST))
        fit(model, TRAIN, VALID, SMALL)
        scores.append(ndcg(score_lists(model, TEST)))
        assert scores[-1] > before - 0.01
    alone = ndcg(TEST.predictions[:, 0])
    assert min(scores) > alone + 0.02


def test_training_is_deterministic_per_seed() -> None:
    config = replace(SMALL, epochs=2)
    torch.manual_seed(5)
    models = [fit_ensemble(OBJECTIVES, TRAIN, VALID, replace(config, seed=seed))[0] for seed in (3, 3, 4)]
    first, again, other = (score_lists(model, VALID) for model in models)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit_ensemble(OBJECTIVES, TRAIN, VALID, replace(config, epochs=1))
    assert torch.equal(torch.rand(1), expected)  # the caller's random state is unchanged
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_scores_are_independent_of_batching(trained: Ensemble) -> None:
    full = score_lists(trained, TEST, 1000)
    np.testing.assert_allclose(score_lists(trained, TEST, 7), full, atol=1e-5)
    one = TEST.select(np.array([4]))
    start = TEST.length[:4].sum()
    np.testing.assert_allclose(score_lists(trained, one), full[start : start + TEST.length[4]], atol=1e-5)


class Recorder(nn.Module):
    """Score with one parameter that records its value at each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.values: list[float] = []

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        return value[..., 0] * self.weight


def scripted(
    monkeypatch: pytest.MonkeyPatch, model: Recorder, ndcgs: list[float], uaucs: list[list[float | None]]
) -> None:
    """Replace validation by scripted metrics per epoch."""

    def measure(scores: np.ndarray, lists: SessionLists, k: int, behaviors: list[str]) -> dict[str, object]:
        epoch = len(model.values)
        model.values.append(model.weight.item())
        behavior_uaucs = zip(behaviors, uaucs[epoch % len(uaucs)], strict=True)
        return {"ndcg": ndcgs[epoch], "behaviors": {name: {"uauc": value} for name, value in behavior_uaucs}}

    monkeypatch.setattr(trainer, "measure_lists", measure)


def test_early_stopping_restores_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorder()
    scripted(monkeypatch, model, [0.3, 0.5, 0.5, 0.4, 0.9], [[0.5, 0.5]])
    history = fit(model, TRAIN, VALID, replace(SMALL, epochs=5, patience=2))
    assert len(history.epochs) == 4
    assert history.best_epoch == 1
    assert model.weight.item() == model.values[1]
    assert len(set(model.values)) == 4
    assert not model.training


def test_pareto_raises_the_weight_of_a_behavior_that_fell(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorder()
    scripted(monkeypatch, model, [0.1, 0.2, 0.3, 0.4], [[0.6, 0.5], [0.6, 0.4], [0.6, None], [0.7, 0.5]])
    config = replace(SMALL, weighting="pareto", pareto_step_size=2.0, behavior_weights={"like": 3.0, "share": 1.0})
    weights = [list(epoch.weights.values()) for epoch in fit(model, TRAIN, VALID, config).epochs]
    moved = 0.25 * np.exp(2.0 * 0.2)
    expected = [[0.75, 0.25], [0.75, 0.25], [0.75 / (0.75 + moved), moved / (0.75 + moved)]]
    np.testing.assert_allclose(weights[:3], expected)
    np.testing.assert_allclose(weights[3], weights[2])  # an unknown UAUC leaves the weights unchanged


def test_min_norm_weights_use_gradients_of_behavior_losses() -> None:
    """One batch before any step: gradients of each behavior's squared error, computed directly."""
    model = LogisticRegression(Standardize([False, True, False], *mean_std(TRAIN)))
    config = replace(SMALL, loss="pointwise", weighting="min_norm", epochs=1, batch_size=len(TRAIN))
    z = model.standardize(torch.from_numpy(TRAIN.predictions))
    inputs = torch.cat([z, torch.ones(len(z), 1)], 1)
    error = inputs @ torch.tensor([1 / 3, 1 / 3, 1 / 3, 0])[:, None] - torch.from_numpy(TRAIN.label)
    gradients = (2 * error[..., None] * inputs[:, None]).mean(0).double().numpy()
    expected = min_norm_weights(gradients @ gradients.T)
    (epoch,) = fit(model, TRAIN, VALID, config).epochs
    np.testing.assert_allclose(list(epoch.weights.values()), expected, rtol=1e-4)


def test_weighted_squared_errors_equal_combined_relevance() -> None:
    rng = torch.Generator().manual_seed(0)
    score = torch.randn(3, 4, generator=rng, requires_grad=True)
    labels, weights = (torch.rand(3, 4, 2, generator=rng) < 0.4).float(), torch.tensor([0.3, 0.7])
    valid = torch.ones(3, 4, dtype=torch.bool)
    mixture = sum(w * pointwise(score, y, valid).total for w, y in zip(weights, labels.unbind(-1), strict=True))
    combined = pointwise(score, combined_relevance(labels, weights), valid).total
    torch.testing.assert_close(*(torch.autograd.grad(loss, score)[0] for loss in (mixture, combined)))


def test_initial_weights_follow_from_rates() -> None:
    lists = TRAIN.select(np.arange(20))
    lists.label[:] = 0
    lists.label[:64, 0] = 1
    lists.label[:4, 1] = 1
    lists.label[100:, 1] = np.nan
    rates = np.array([64 / len(lists.item), 4 / 100])
    for balance in (0.0, 0.5, 1.0):
        names, weights = initial_behavior_weights(lists, replace(SMALL, inverse_rate_exponent=balance))
        expected = rates**-balance
        assert names == ["like", "share"]
        np.testing.assert_allclose(weights, expected / expected.sum())
    lists.label[:, 0] = 0
    assert initial_behavior_weights(lists, SMALL) == (["share"], np.array([1.0]))
    names, weights = initial_behavior_weights(TRAIN, replace(SMALL, behavior_weights={"share": 3.0, "like": 1.0}))
    assert (names, weights.tolist()) == (["share", "like"], [0.75, 0.25])


@pytest.mark.parametrize("weighting", ["min_norm", "pareto_efficient"])
@pytest.mark.parametrize("loss", ["listwise", "pairwise"])
def test_learns_if_a_batch_has_no_positive_of_a_behavior(weighting: str, loss: str) -> None:
    """Its gradient is zero, so the unrestricted minimum norm would be zero."""
    lists = replace(TRAIN, label=TRAIN.label.copy())
    lists.label[:, 1] = 0
    lists.label[0, 1] = 1
    model = LogisticRegression(Standardize([False, True, False], *mean_std(TRAIN)))
    config = replace(
        SMALL, loss=loss, weighting=weighting, epochs=1, batch_size=16, weight_decay=0.0, reweight_interval=1
    )
    config = replace(config, behavior_weights={"like": 1.0, "share": 3.0}, min_weight=0.1)
    (epoch,) = fit(model, lists, VALID, config).epochs
    assert epoch.weights["like"] > 0.8, "37 of 38 batches have no share"
    assert epoch.metrics["behaviors"]["like"]["ndcg"] > ndcg(np.zeros(len(VALID.item)), VALID) + 0.1


@pytest.mark.parametrize("weighting", ["fixed", "min_norm"])
@pytest.mark.parametrize("loss", ["pointwise", "pairwise", "listwise"])
def test_candidates_without_known_labels_are_not_negatives(loss: str, weighting: str) -> None:
    """Pointwise and pairwise losses equal those without them; the listwise loss equals that with negative labels."""
    known = np.random.default_rng(0).random(len(TRAIN.item)) < 0.6
    starts = np.cumsum(TRAIN.length) - TRAIN.length
    known[starts] = True  # lists have at least one candidate
    unknown = replace(TRAIN, label=np.where(known[:, None], TRAIN.label, np.nan).astype(np.float32))
    negative = replace(TRAIN, label=np.nan_to_num(unknown.label))
    names = ("item", "predictions", "label", "context")
    without = {name: getattr(TRAIN, name)[known] for name in names}
    without = replace(TRAIN, length=np.add.reduceat(known, starts), **without)
    same, other = (negative, without) if loss == "listwise" else (without, negative)
    config = replace(SMALL, loss=loss, weighting=weighting, epochs=3, batch_size=len(TRAIN), lr=0.05)  # type: ignore[arg-type]
    config = replace(config, behavior_weights={"like": 1.0, "share": 1.0})
    losses = []
    for lists in (unknown, same, other):
        model = LogisticRegression(Standardize([False, True, False], *mean_std(TRAIN)))
        losses.append([epoch.loss for epoch in fit(model, lists, VALID, config).epochs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=0.02)


def test_known_labels_count_if_others_are_unknown() -> None:
    """An unknown share contributes no relevance if the like is known."""
    unknown, none = TRAIN.label.copy(), TRAIN.label.copy()
    unknown[::3, 1], none[::3, 1] = np.nan, 0
    config = replace(SMALL, loss="pointwise", weighting="fixed", epochs=1, behavior_weights={"like": 1.0, "share": 1.0})
    models = [fit_ensemble(OBJECTIVES, replace(TRAIN, label=labels), VALID, config)[0] for labels in (unknown, none)]
    one, other = (score_lists(model, VALID) for model in models)
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("train", "valid", "changes", "error", "reason"),
    [
        (TRAIN.select(np.array([], int)), VALID, {}, DataError, "no session list to train on"),
        (TRAIN, VALID.select(np.array([], int)), {}, DataError, "no validation list has a positive and a negative"),
        (
            TRAIN,
            VALID,
            {"behavior_weights": {"buy": 1.0}},
            ConfigError,
            r"buy: the lists have \['like', 'share'\]",
        ),
        (
            replace(TRAIN, label=TRAIN.label * [0, 1]),
            VALID,
            {"behavior_weights": {"like": 1.0}},
            ConfigError,
            "behavior_weights.like: no training list has a positive",
        ),
        (replace(TRAIN, label=TRAIN.label * 0), VALID, {}, DataError, "positive of any behavior"),
        (TRAIN, VALID, {"weighting": "pareto_efficient", "min_weight": 0.6}, ConfigError, "minimum weights"),
        (replace(TRAIN, objectives=("a", "b", "c")), VALID, {}, ConfigError, r"the lists have objectives \['a'"),
    ],
)
def test_rejects_invalid_lists_and_settings(
    train: SessionLists, valid: SessionLists, changes: dict[str, object], error: type[UserError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        fit_ensemble(OBJECTIVES, train, valid, replace(SMALL, **changes))  # type: ignore[arg-type]


def test_reports_a_non_finite_loss() -> None:
    model = Recorder()
    model.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"loss is nan; decrease ensemble\.lr"):
        fit(model, TRAIN, VALID, SMALL)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lr": 0.0}, r"ensemble\.lr 0\.0 must be positive"),
        ({"pareto_step_size": -1.0}, r"ensemble\.pareto_step_size -1\.0 must be at least 0"),
        ({"min_weight": 0.5, "max_weight": 0.4}, "must be above ensemble.min_weight"),
        ({"max_weight": 1.5}, "at most 1"),
        ({"hidden_dims": []}, r"ensemble\.hidden_dims \[\]"),
        ({"behavior_weights": {"like": -1.0}}, r"ensemble\.behavior_weights\.like -1\.0 must be positive"),
    ],
)
def test_rejects_invalid_settings(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EnsembleConfig(**changes)  # type: ignore[arg-type]


CARD = EnsembleCard(
    objectives=OBJECTIVES,
    behavior_weights={"like": 0.3, "share": 0.7},
    d_event=2,
    d_context=2,
    config=replace(SMALL, epochs=10),
    run="runs/a",
    step=120,
    checkpoint="0123456789ab",
    max_monotonicity_violation={"like": 0.0, "glance": 0.0, "watch_time": 0.0},
    metrics={"ndcg": 0.6, "best": None},
)


def test_save_and_load_round_trip(trained: Ensemble, tmp_path: Path) -> None:
    folder = f"{tmp_path}/deep/ensemble/"
    standardize = Standardize([False, True, False], *mean_std(TRAIN))
    baseline = SessionWeightedFusion(standardize, 2, 2, dim=4)
    save_ensemble(folder, trained, CARD, {"session": baseline})
    model, card = load_ensemble(folder)
    assert card == CARD
    assert not model.training
    assert np.array_equal(score_lists(model, TEST), score_lists(trained, TEST))
    again = SessionWeightedFusion(Standardize([False] * 3, torch.zeros(3), torch.ones(3)), 2, 2, dim=4)
    load_baseline(folder, "session", again)
    assert np.array_equal(score_lists(again, TEST), score_lists(baseline, TEST))
    assert os.listdir(tmp_path / "deep") == ["ensemble"]
    assert yaml.safe_load((tmp_path / "deep/ensemble/ensemble.yaml").read_text())["objectives"][1] == {
        "name": "glance",
        "higher_is_better": False,
    }


def test_saving_replaces_the_previous_ensemble(trained: Ensemble, tmp_path: Path) -> None:
    folder = f"{tmp_path}/ensemble"
    save_ensemble(folder, trained, CARD, {"old": LogisticRegression(Standardize([False], *torch.ones(2, 1)))})
    newer = copy.deepcopy(trained)
    newer.set_normalization(newer.mean + 1, newer.scale)
    save_ensemble(folder, newer, replace(CARD, step=240))
    model, card = load_ensemble(folder)
    assert card.step == 240
    torch.testing.assert_close(model.mean, newer.mean)
    assert sorted(os.listdir(folder)) == ["ensemble.safetensors", "ensemble.yaml"]
    assert os.listdir(tmp_path) == ["ensemble"]


def test_failed_save_keeps_the_previous_ensemble(
    trained: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"{tmp_path}/ensemble"
    save_ensemble(folder, trained, CARD)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for target, name in ((io, "save"), (io.paths, "move_dir")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(UserError, match=r"cannot write the ensemble .*No space left"):
                save_ensemble(folder, trained, replace(CARD, step=240))
        assert load_ensemble(folder)[1] == CARD
        assert os.listdir(tmp_path) == ["ensemble"]


def test_rejects_a_directory_with_other_files(trained: Ensemble, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an ensemble directory"):
        save_ensemble(str(tmp_path), trained, CARD)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_rejects_missing_and_corrupted_ensembles(trained: Ensemble, tmp_path: Path) -> None:
    folder = tmp_path / "ensemble"
    with pytest.raises(UserError, match=r"ensemble: directory not found"):
        load_ensemble(str(folder))
    save_ensemble(str(folder), trained, CARD)
    card, weights = folder / "ensemble.yaml", folder / "ensemble.safetensors"
    text, tensors = card.read_text(), weights.read_bytes()
    for damaged in (
        text.replace("format: 5", "format: 4"),
        text.replace("checkpoint:", "point:"),
        text.replace("step:", "stride:"),
        text.replace("higher_is_better: false", "higher_is_better: least"),
        text.replace("degree: 8", "degree: -8"),
        "objectives: [",
        "just words",
        "",
    ):
        card.write_text(damaged)
        with pytest.raises(UserError, match=r"ensemble\.yaml: ") as caught:
            load_ensemble(str(folder))
        assert "\n" not in str(caught.value)
    card.write_text(text)
    for part in (tensors[:-50], tensors[:5], b"", b"nonsense" * 100):
        weights.write_bytes(part)
        with pytest.raises(
            UserError, match=r"ensemble\.safetensors: incompatible with its config, or corrupted"
        ) as caught:
            load_ensemble(str(folder))
        assert "\n" not in str(caught.value)
    weights.write_bytes(tensors)
    card.write_text(text.replace("dim: 4", "dim: 8"))
    with pytest.raises(
        UserError, match=r"ensemble\.safetensors: incompatible with its config, or corrupted .*size mismatch"
    ):
        load_ensemble(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=r"ensemble\.safetensors: not found"):
        load_ensemble(str(folder))
    with pytest.raises(UserError, match=r"baseline-mlp\.safetensors: not found"):
        load_baseline(str(folder), "mlp", trained)
