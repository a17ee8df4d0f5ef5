"""A run of two ranks with an ensemble, exported by one process: the exported model equals the trained one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from a2gen_rec.cli.main import main
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.runs.rank import rank_run
from a2gen_rec.runs.row_order import export_permutation
from a2gen_rec.training import checkpoint
from tests.helpers.cards import checkpoint_tensors
from tests.helpers.distributed import CommandJob
from tests.helpers.logs import Log, simulated_log

pytestmark = pytest.mark.processes

ENSEMBLE = {
    "epochs": 2,
    "dim": 4,
    "hidden-dims": "[6, 4]",
    "quadrature-degree": 16,
    "batch-size": 16,
    "formula-trials": 4,
}
OPTIONS = {
    "model.dim": 8,
    "model.num-heads": 2,
    "model.feedback-encoding": "dual_view_full",
    "model.session-features": "true",
    "model.predict-objectives": "true",
    "optim.dense-lr": 0.03,
    "optim.sparse-lr": 0.3,
    "loader.max-impressions-per-batch": 300,
    "loader.prefetch": "false",
    "sharding.sharding-types": "[row_wise]",
    "train.max-steps": 6,
    "evaluate.max-unexplored-mass": 0.0,
}


def options(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, str, str]:
    """The log, the run of two ranks, and its export in float32."""
    folder = tmp_path_factory.mktemp("exported_run")
    log, run = simulated_log(folder), str(folder / "two")
    arguments = ["train", "--data", log.data, "--run", run, *options(OPTIONS)]
    codes, output = CommandJob(2, folder / "output.log", arguments).wait()
    assert codes == [0, 0], output
    main(["ensemble", "train", "--run", run, *options(ENSEMBLE)])
    export_run(run, str(folder / "model"), "fp32")
    return log, run, str(folder / "model")


def test_exported_tables_equal_the_sharded_tables(exported: tuple[Log, str, str], tmp_path: Path) -> None:
    log, run, model = exported
    order = export_permutation(Dataset.open(log.data))
    trained = checkpoint_tensors(checkpoint.best(run), tmp_path / "full.pt")
    exported_tables = load_file(f"{model}/tables.safetensors")
    for name in ("user_id", "item_id", "author_id"):
        (weight,) = (value for key, value in trained.items() if key.endswith(f"embeddings.{module_key(name)}.weight"))
        assert torch.equal(exported_tables[f"{name}/values"], weight[order[name]]), name


def test_exported_ensemble_scores_equal_the_run(exported: tuple[Log, str, str], tmp_path: Path) -> None:
    log, run, model = exported
    ranker = Ranker.load(model)
    assert ranker.sort_keys[0] == "ensemble"
    names = ranker.sample_items(30)
    (tmp_path / "candidates").write_text("\n".join(names))
    for user in sorted(log.impressions)[:3]:
        # The run ranks one millisecond after the last impression of the user in the dataset, in the same tab.
        expected = rank_run(run, user, str(tmp_path / "candidates"), k=30)
        last = log.impressions[user][-1]
        query = RankQuery(user, names, None, ranker.encode(log.impressions[user]), k=30, context=dict(last.features))
        actual = ranker.rank(query)
        assert actual.sort_by == expected.sort_by == "ensemble"
        expected_scores = {candidate.item: candidate.score for candidate in expected.candidates}
        scores = {candidate.item: candidate.score for candidate in actual.candidates}
        assert scores == pytest.approx(expected_scores, abs=1e-5)
        assert len(set(scores.values())) > 20, "equal scores would make the comparison meaningless"
