"""Wide part: blended predictions, independent outcomes, missing values, settings."""

import dataclasses

import numpy as np
import pytest
import torch

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.errors import ConfigError
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.factory import build_model
from a2gen_rec.models.wide_towers import WidePredictions
from tests.helpers.cards import make_card, make_columns, make_rich_card, random_vectors, small_config
from tests.helpers.models import build_double, forward, make_batch

CARD = make_card()
CONFIG = small_config(predict_objectives=True, session_features=True, feedback_encoding="tokens")
COLUMNS = make_columns(CARD, 8, np.random.default_rng(5))


def randomized() -> RankingModel:
    return build_double(CARD, CONFIG, randomize=True).eval()


@pytest.mark.parametrize("generator", ["explicit", "independent_heads"])
@torch.no_grad()
def test_predictions_are_means_of_both_parts(generator: str) -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, generator=generator))
    model = build_double(CARD, config, randomize=True).eval()
    output = forward(model, make_batch(CARD, COLUMNS, config))
    deep = model.ranker.marginals(dataclasses.replace(output, wide=None), max_unexplored_mass=0.0)
    both = model.ranker.marginals(output, max_unexplored_mass=0.0)
    wide: WidePredictions = output.wide
    log_odds = (torch.logit(deep.probability[:, 1:-1].clamp(1e-6, 1 - 1e-4)) + wide.event_logits) / 2
    torch.testing.assert_close(both.probability[:, 1:-1], log_odds.sigmoid())
    assert torch.equal(both.probability[:, [0, -1]], deep.probability[:, [0, -1]]), "start and exit must be unchanged"
    for name, code in zip(CARD.actions, range(len(CARD.actions)), strict=True):
        expected = (deep.time[:, code] + wide.time[:, code]) / 2 if name in CARD.timed_actions else deep.time[:, code]
        torch.testing.assert_close(both.time[:, code], expected, equal_nan=True)
    torch.testing.assert_close(output.label_probability, ((output.label_logits + wide.label_logits) / 2).sigmoid())
    objectives = (output.objective_logits + wide.objective_logits) / 2
    torch.testing.assert_close(output.objective_probability, objectives.sigmoid())


def test_a_time_that_only_the_wide_part_predicts() -> None:
    model = randomized()
    output = forward(model, make_batch(CARD, COLUMNS, CONFIG))
    marginals = model.ranker.marginals(output, max_unexplored_mass=0.0)
    unexplored = dataclasses.replace(marginals, time=torch.full_like(marginals.time, torch.nan))
    blended = output.wide.blend_with(unexplored, model.ranker.is_timed)
    timed = model.ranker.is_timed
    torch.testing.assert_close(blended.time[:, timed], output.wide.time[:, timed])
    assert blended.time[:, ~timed].isnan().all()


def test_outcomes_share_no_parameter() -> None:
    """The gradient of one outcome's prediction reaches no hidden unit of another's."""
    model = randomized()
    wide, hidden = model.ranker.wide, CONFIG.model.wide_dim
    output = forward(model, make_batch(CARD, COLUMNS, CONFIG)).wide
    outcomes = torch.cat([output.event_logits, output.label_logits, output.objective_logits], dim=1)
    assert outcomes.shape[1] >= 5
    for outcome in range(outcomes.shape[1]):
        first, towers = torch.autograd.grad(
            outcomes[:, outcome].sum(), [wide.first.weight, wide.second.weight], retain_graph=True
        )
        reached = first.unflatten(0, (-1, hidden)).flatten(1).abs().sum(1) > 0
        assert reached.nonzero().flatten().tolist() == [outcome]
        assert (towers.flatten(1).abs().sum(1) > 0).nonzero().flatten().tolist() == [outcome]


def test_the_wide_part_is_trained_by_its_own_loss() -> None:
    model = randomized()
    batch = make_batch(CARD, COLUMNS, CONFIG)
    gradients = {}
    for weight in (0.0, 1.0):
        loss = Loss(dataclasses.replace(CONFIG.loss, wide_weight=weight), 1, model.ranker.objective_tasks)
        model.zero_grad()
        loss(forward(model, batch), batch)[0].backward()
        gradients[weight] = {name: parameter.grad for name, parameter in model.ranker.named_parameters()}
    for name, gradient in gradients[0.0].items():
        if name.startswith("wide."):
            assert gradient is None or not gradient.any(), name
            assert gradients[1.0][name].any(), name
        else:
            assert gradient is None or torch.equal(gradient, gradients[1.0][name]), name


@torch.no_grad()
def test_dropout_changes_no_time() -> None:
    config = small_config(predict_objectives=True, wide_dropout=0.5)
    model = build_double(CARD, config, randomize=True).train()
    batch = make_batch(CARD, COLUMNS, config)
    first, second = forward(model, batch).wide, forward(model, batch).wide
    assert torch.equal(first.time, second.time)
    for name in ("event_logits", "label_logits", "objective_logits"):
        assert not torch.equal(getattr(first, name), getattr(second, name)), name


@torch.no_grad()
def test_starts_at_base_rates_whatever_is_missing() -> None:
    card = make_rich_card()
    config = small_config(predict_objectives=True)
    columns = make_columns(card, 8, np.random.default_rng(1))
    model = build_model(card, config, torch.device("cpu")).eval()
    batch = make_batch(card, columns, config, vectors=random_vectors(card, np.random.default_rng(2)))
    output = model(batch).wide
    rates = torch.tensor([card.base_rate[name] for name in card.predicted_actions]).clamp(1e-4, 1 - 1e-4)
    torch.testing.assert_close(output.event_logits.sigmoid(), rates.expand_as(output.event_logits))
    model.ranker.wide.last.normal_()
    assert model(batch).wide.event_logits.isfinite().all()
    missing = dataclasses.replace(
        batch, numbers=torch.full_like(batch.numbers, torch.nan), user_numbers=batch.user_numbers * torch.nan
    )
    changed = model(missing).wide.event_logits
    assert changed.isfinite().all()
    assert not torch.equal(changed, model(batch).wide.event_logits)


@pytest.mark.parametrize("settings", [{"wide_dim": 0}, {"statistics": False}])
def test_settings_without_a_wide_part(settings: dict[str, int]) -> None:
    config = Config(model=dataclasses.replace(CONFIG.model, **settings))
    model = build_model(CARD, config, torch.device("meta"))
    assert model.ranker.wide is None
    assert not any(name.startswith("wide") for name, _ in model.ranker.named_parameters())


@pytest.mark.parametrize(("name", "value"), [("wide_dim", -1), ("wide_dropout", 1.0)])
def test_rejects_invalid_settings(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"model.{name}"):
        ModelConfig(**{name: value})
