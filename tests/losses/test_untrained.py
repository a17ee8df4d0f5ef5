"""Outcomes without positives in training: losses ignore them, in every ranker."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from a2gen_rec.config import LossConfig
from a2gen_rec.data.schema import WATCH_TIME
from a2gen_rec.losses.loss import TERM_NAMES, Loss, loss_sums
from a2gen_rec.losses.targets import target_outcomes
from tests.helpers.cards import make_card, make_columns, small_config
from tests.helpers.models import build_double, forward, make_batch

MODELS = [
    {},
    {"generator": "implicit"},
    {"generator": "independent_heads"},
    {"use_action_order": False},
    {"name": "mmoe"},
    {"name": "hstu"},
]


def outputs(model: dict, zero: tuple[str, ...]):
    """Return the outputs of one model for cards with and without the rates ``zero``, and the batch."""
    card = make_card()
    # Statistics compare with the rates, so they would differ too.
    config = small_config(predict_objectives=True, statistics=False, **model)
    columns = make_columns(card, 12, np.random.default_rng(0))
    models = []
    for names in ((), zero):
        rates = {name: 0.0 if name in names else 0.2 for name in card.base_rate}
        models.append(build_double(replace(card, base_rate=rates), config))
    models[1].load_state_dict(models[0].state_dict())
    batch = make_batch(card, columns, config)
    return card, [forward(model, batch) for model in models], batch


@pytest.mark.parametrize("model", MODELS)
def test_untrained_outcomes_are_ignored(model: dict) -> None:
    card = make_card()
    action, label, objective = card.predicted_actions[0], card.labels[0], card.objectives[0]
    card, (full, masked), batch = outputs(model, (action, label, objective))
    assert full.trained is None
    config = LossConfig()
    before, after = loss_sums(full, batch, config), loss_sums(masked, batch, config)
    occurred, _ = target_outcomes(batch, len(card.actions))
    code = card.actions.index(action)
    assert occurred[:, code].any(), "without the action, the test would be empty"
    index = TERM_NAMES.index
    if full.is_generative:
        logits = full.steps.logits
        keep = batch.step_label != code
        expected = F.cross_entropy(logits[keep], batch.step_label[keep], reduction="sum")
        bce = F.binary_cross_entropy_with_logits(full.occurrence.logits, occurred[:, 1:-1].double(), reduction="none")
        torch.testing.assert_close(after[index("occurrence")], (bce.sum(0) / full.occurrence.entropy)[1:].sum())
    else:
        logits = full.event_logits
        expected = F.binary_cross_entropy_with_logits(logits[:, 1:], occurred[:, 2:-1].double(), reduction="sum")
    torch.testing.assert_close(after[index("action")], expected)
    assert after[index("action")] < before[index("action")]
    assert after[index("time")] < before[index("time")]
    assert after[index("label")] < before[index("label")]
    assert after[len(TERM_NAMES)] == 0 < before[len(TERM_NAMES)]
    torch.testing.assert_close(after[len(TERM_NAMES) + 1 :], before[len(TERM_NAMES) + 1 :])


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_finite_without_any_trained_outcome(model: dict) -> None:
    card = make_card()
    outcomes = (*card.predicted_actions, *card.labels, *card.objectives)
    card, (_, masked), batch = outputs(model, outcomes)
    tasks = (*card.objectives, *([] if masked.watch_time is None else [WATCH_TIME]))
    loss, _ = Loss(LossConfig(), tasks=tasks)(masked, batch)
    loss.backward()
    assert torch.isfinite(loss)
