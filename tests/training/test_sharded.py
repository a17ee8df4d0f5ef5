"""Sharded training: results are independent of the number of ranks and the sharding plan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from a2gen_rec.config import Config
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.losses.loss import term_means, total_loss
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import TrainingModel, build_training_model
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils.distributed import DistributedContext, all_reduce_sum
from tests.helpers.cards import checkpoint_tensors, full_tables, make_card, small_config, write_dataset
from tests.helpers.distributed import on_ranks

pytestmark = pytest.mark.processes

CARD = make_card()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data", CARD)


def make_config(sharding: str = "row_wise", uncertainty: bool = False, **model: object) -> Config:
    config = small_config(**model)
    config.loss.uncertainty_weighting = uncertainty
    config.sharding.sharding_types = [sharding]  # type: ignore[list-item]
    return config


def state_of(config: Config, step: int) -> checkpoint.TrainState:
    from dataclasses import asdict

    return checkpoint.TrainState(step, 0, [], None, None, 0, asdict(config), "", CARD.to_dict())


def steps(
    built: TrainingModel, process: DistributedContext, dataset: str, config: Config, first: int, last: int
) -> list[float]:
    """Global losses of optimizer steps on global batches of 16 windows, split over ranks."""
    card = DatasetCard.load(dataset)
    files = sorted(str(file) for file in Path(dataset, "train").iterdir())
    columns = read_columns(read_row_groups(files), card)
    losses = []
    for step in range(first, last):
        rows = np.random.default_rng(step).permutation(len(columns))[:16]
        batch = collate(columns, rows[process.rank :: process.world_size], full_tables(card, config))
        batch = replace(batch, counts=all_reduce_sum(batch.counts.clone()))
        built.optimizer.zero_grad()
        loss, (sums, _) = built.model_parallel(batch)
        loss.backward()
        built.optimizer.step()
        terms = term_means(all_reduce_sum(sums.double()), batch.counts, built.model.ranker.is_generative)
        losses.append(float(total_loss(terms, config.loss, built.model.ranker.objective_tasks)))
    return losses


def run(
    process: DistributedContext, dataset: str, config: Config, source: str, first: int, last: int, out: str
) -> tuple[list[float], list[str]]:
    """Load step ``first`` from ``source`` (if given), take steps, save the result in ``out``."""
    built = build_training_model(CARD, config, process)
    if source:
        checkpoint.load(RunDir(source).checkpoint(first), built)
    losses = steps(built, process, dataset, config, first, last)
    if out:
        checkpoint.save(out, built, state_of(config, last), keep_latest_k=0)
    kinds = [parameter.sharding_type for module in built.plan.plan.values() for parameter in module.values()]
    return losses, kinds


def tensors(run: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint except random states."""
    saved = checkpoint_tensors(RunDir(str(run)).checkpoint(step), scratch / f"{run.name}-{step}.pt")
    return {name: value for name, value in saved.items() if not name.startswith("/rng")}


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"generator": "implicit", "time_head": "monotonic"},
        {
            "feedback_encoding": "dual_view_full",
            "session_features": True,
            "predict_objectives": True,
            "uncertainty": True,
        },
        {
            "name": "ple",
            "feedback_encoding": "tokens",
            "session_features": True,
            "predict_objectives": True,
            "uncertainty": True,
        },
        {"name": "hstu"},
    ],
)
def test_one_and_two_ranks_reach_the_same_parameters(variant: dict, dataset: Path, tmp_path: Path) -> None:
    config = make_config(**variant)
    steps = 10  # enough to learn, few enough that rounding amplified by norms and gates stays small
    initial, one, two = tmp_path / "begin", tmp_path / "one", tmp_path / "two"
    on_ranks(1, tmp_path, run, str(dataset), config, "", 0, 0, str(initial))
    (single,) = on_ranks(1, tmp_path, run, str(dataset), config, str(initial), 0, steps, str(one))
    double = on_ranks(2, tmp_path, run, str(dataset), config, str(initial), 0, steps, str(two))
    assert double[0][0] == double[1][0]
    assert single[0] == pytest.approx(double[0][0], rel=1e-5)
    assert single[0][-1] < single[0][0], "training must make progress for a meaningful comparison"
    left, right = tensors(one, steps, tmp_path), tensors(two, steps, tmp_path)
    start = tensors(initial, 0, tmp_path)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    weights = [name for name in left if "/model/" in name and name.endswith("weight")]
    weights += [name for name in left if name.endswith("log_variance")]
    still = [name for name in weights if torch.equal(left[name], start[name])]
    assert not still, "every table and layer must have been trained"


def weight_decay(process: DistributedContext, config: Config) -> dict[str, float]:
    """Weight decay of every dense parameter, by name."""
    built = build_training_model(CARD, config, process)
    names = {
        id(parameter): name for name, parameter in built.model_parallel.named_parameters() if "embeddings" not in name
    }
    return {
        names[id(parameter)]: group["weight_decay"]
        for group in built.optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    }


def test_learned_loss_weights_do_not_decay(tmp_path: Path) -> None:
    config = make_config(predict_objectives=True, uncertainty=True)
    config.optim.weight_decay = 0.25
    (decay,) = on_ranks(1, tmp_path, weight_decay, config)
    assert decay.pop("loss.uncertainty_weighting.log_variance") == 0.0
    assert set(decay.values()) == {0.25}
    assert "model.ranker.objectives.last_bias" in decay


def decayed_rows(process: DistributedContext, dataset: str, config: Config) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Return the item table before and after a step with zero gradients, and the looked-up rows."""
    built = build_training_model(CARD, config, process)
    columns = read_columns(read_row_groups(sorted(str(file) for file in Path(dataset, "train").iterdir())), CARD)
    batch = collate(columns, np.arange(3), full_tables(CARD, config))
    name = next(name for name in built.model.state_dict() if name.endswith("table_item_id.weight"))

    def table() -> np.ndarray:
        (shard,) = built.model.state_dict()[name].local_shards()
        return shard.tensor.numpy().copy()

    before = table()
    loss, _ = built.model_parallel(batch)
    (loss * 0).backward()
    built.optimizer.step()
    return before, table(), set(batch.sparse["item_id"].values().tolist())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_looked_up_rows_decay(decay: float, dataset: Path, tmp_path: Path) -> None:
    config = make_config()
    config.optim.sparse_weight_decay, config.optim.sparse_lr = decay, 0.1
    ((before, after, rows),) = on_ranks(1, tmp_path, decayed_rows, str(dataset), config)
    assert 0 < len(rows) < len(before)
    factor = np.ones((len(before), 1), np.float32)
    factor[sorted(rows)] = 1 - 0.1 * decay
    np.testing.assert_allclose(after, before * factor, rtol=1e-6)


def test_resumes_under_another_plan_and_world_size(dataset: Path, tmp_path: Path) -> None:
    rowwise, tablewise = make_config("row_wise"), make_config("table_wise")
    saved = tmp_path / "saved"
    ((_, kinds), _) = on_ranks(2, tmp_path, run, str(dataset), rowwise, "", 0, 5, str(saved))
    assert set(kinds) == {"row_wise"}
    same = on_ranks(2, tmp_path, run, str(dataset), rowwise, str(saved), 5, 10, "")[0][0]
    alone = on_ranks(1, tmp_path, run, str(dataset), rowwise, str(saved), 5, 10, "")[0][0]
    other, kinds = on_ranks(2, tmp_path, run, str(dataset), tablewise, str(saved), 5, 10, "")[0]
    assert set(kinds) == {"table_wise"}
    fresh = on_ranks(1, tmp_path, run, str(dataset), rowwise, "", 5, 10, "")[0][0]
    assert alone == pytest.approx(same, rel=1e-5)
    assert other == pytest.approx(same, rel=1e-5)
    assert fresh != pytest.approx(same, rel=1e-3), "the checkpoint must matter"
