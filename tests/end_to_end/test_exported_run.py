"""A run of two ranks with an ensemble, exported by one process: what is served is what was trained."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from a2gen_rec.cli.main import main
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.runs.rank import rank_run
from a2gen_rec.runs.row_order import export_permutation
from a2gen_rec.training import checkpoint
from tests.helpers.cards import checkpoint_tensors
from tests.helpers.logs import Log, simulated_log

LAUNCH = [
    sys.executable,
    "-m",
    "a2gen_rec.launch.torchrun",
    "--standalone",
    "--nnodes=1",
    "--nproc_per_node=2",
    "-m",
    "--",
]
ENSEMBLE = {"epochs": 2, "dim": 4, "hidden": "[6, 4]", "degree": 16, "batch_lists": 16, "formula_trials": 4}
OPTIONS = {
    "model.dim": 8,
    "model.num_heads": 2,
    "model.feedback_encoding": "dual_view_full",
    "model.session_features": "true",
    "model.predict_objectives": "true",
    "optim.dense_lr": 0.03,
    "optim.sparse_lr": 0.3,
    "loader.max_impressions_per_batch": 300,
    "loader.prefetch": "false",
    "sharding.sharding_types": "[row_wise]",
    "train.max_steps": 6,
    "evaluate.max_unexplored_mass": 0.0,
}


def options(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, str, str]:
    """The log, the run of two ranks, and its export in float32."""
    folder = tmp_path_factory.mktemp("exported_run")
    log, run = simulated_log(folder), str(folder / "two")
    command = [*LAUNCH, "a2gen_rec.cli", "train", "--data", log.data, "--run", run, *options(OPTIONS)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    main(["ensemble", "train", "--run", run, *options(ENSEMBLE)])
    export_run(run, str(folder / "model"), "fp32")
    return log, run, str(folder / "model")


def test_tables_are_those_that_the_ranks_had_parts_of(exported: tuple[Log, str, str], tmp_path: Path) -> None:
    log, run, model = exported
    order = export_permutation(Dataset.open(log.data))
    trained = checkpoint_tensors(checkpoint.best(run), tmp_path / "whole.pt")
    found = load_file(f"{model}/tables.safetensors")
    for name in ("user_id", "item_id", "author_id"):
        (weight,) = (value for key, value in trained.items() if key.endswith(f"embeddings.{name}.weight"))
        assert torch.equal(found[f"{name}/values"], weight[order[name]]), name


def test_the_ensemble_scores_as_in_the_run(exported: tuple[Log, str, str], tmp_path: Path) -> None:
    log, run, model = exported
    ranker = Ranker.load(model)
    assert ranker.sort_keys[0] == "ensemble"
    names = ranker.sample_items(30)
    (tmp_path / "candidates").write_text("\n".join(names))
    for user in sorted(log.impressions)[:3]:
        # The run ranks after what the dataset has last of a user, a millisecond later, in whatever tab that was.
        expected = rank_run(run, user, str(tmp_path / "candidates"), k=30)
        last = log.impressions[user][-1]
        asked = RankQuery(user, names, None, ranker.encode(log.impressions[user]), k=30, context=dict(last.features))
        answer = ranker.rank(asked)
        assert answer.sort_by == expected.sort_by == "ensemble"
        theirs = {each.item: each.score for each in expected.candidates}
        mine = {each.item: each.score for each in answer.candidates}
        assert mine == pytest.approx(theirs, abs=1e-5)
        assert len(set(mine.values())) > 20, "scores must differ, or nothing is compared"
