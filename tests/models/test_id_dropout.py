"""Identifier dropout: vectors of identifiers are replaced by row 0 in training only."""

import numpy as np
import pytest
import torch

from a2gen_rec.config import Config, LoaderConfig, ModelConfig
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.errors import ConfigError
from a2gen_rec.models import base
from tests.helpers.cards import make_card, make_columns, small_config
from tests.helpers.models import build_double, lookup, make_batch

CARD = make_card()


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> WindowColumns:
    monkeypatch.setattr(base, "MIN_ID_ROWS", 30)  # user_id and item_id, not author_id
    return make_columns(CARD, 6, np.random.default_rng(0))


def embed(columns: WindowColumns, config: Config, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [targets, d_item] and [targets, d_user] embeddings."""
    model, batch = build_double(CARD, config, randomize=True), make_batch(CARD, columns, config)
    model.train(training)
    inputs = model.ranker._embed(lookup(model, batch), batch, model.ranker._layout(batch))
    return inputs.target, inputs.user


def test_training_replaces_identifiers_only(columns: WindowColumns) -> None:
    dim = 8
    config = small_config(id_dropout=0.999999)
    target, user = embed(columns, config, training=True)
    whole_target, whole_user = embed(columns, config, training=False)
    model = build_double(CARD, config, randomize=True)
    weights = model.embeddings.embeddings
    torch.testing.assert_close(target[:, :dim], weights["table_item_id"].weight[0].expand(len(target), -1))
    torch.testing.assert_close(user[:, :dim], weights["table_user_id"].weight[0].expand(len(user), -1))
    assert torch.equal(target[:, dim:], whole_target[:, dim:])
    assert torch.equal(user[:, dim:], whole_user[:, dim:])
    assert not torch.equal(target[:, :dim], whole_target[:, :dim])


def test_share_of_replaced_identifiers(columns: WindowColumns) -> None:
    torch.manual_seed(0)
    columns = make_columns(CARD, 400, np.random.default_rng(1))
    config = small_config(id_dropout=0.25)
    model, batch = build_double(CARD, config, randomize=True), make_batch(CARD, columns, config)
    rows = lookup(model, batch)["item_id"].values()
    share = [(model.ranker._drop_ids("item_id", rows, batch)[1:] == rows[:1]).all(1).float().mean() for _ in range(100)]
    assert torch.stack(share).mean().item() == pytest.approx(0.25, abs=0.03)


def test_no_dropout_in_evaluation_and_by_default(columns: WindowColumns) -> None:
    evaluated = embed(columns, small_config(id_dropout=0.9), training=False)
    default = embed(columns, small_config(), training=True)
    assert all(torch.equal(*pair) for pair in zip(evaluated, default, strict=True))


def test_requires_deduplicated_lookups() -> None:
    with pytest.raises(ConfigError, match=r"model.id_dropout: loader.deduplicate_ids must be on"):
        Config(model=ModelConfig(id_dropout=0.5), loader=LoaderConfig(deduplicate_ids=False))
