"""Baselines from training to evaluation, session lists and a ranked list."""

import math
from pathlib import Path

import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.ensemble.score_lists import score_session_lists
from a2gen_rec.errors import UserError
from a2gen_rec.evaluation.evaluate import evaluate
from a2gen_rec.runs.rank import rank_run
from a2gen_rec.training.checkpoint import TrainState
from a2gen_rec.training.entrypoint import train
from a2gen_rec.training.loaded_run import load_run
from a2gen_rec.training.run_dir import RunDir
from tests.helpers.cards import SMALL_MODEL_OPTIONS, make_card, small_config, write_dataset

pytestmark = pytest.mark.training

CARD = make_card()
SMALL = [*SMALL_MODEL_OPTIONS, "--loader.max-impressions-per-batch", "200"]
FEATURES = [
    "--model.feedback-encoding",
    "dual_view_full",
    "--model.session-features",
    "true",
    "--model.predict-objectives",
    "true",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data", CARD, windows=25)


@pytest.mark.parametrize("name", ["mmoe", "ple", "hstu"])
def test_trains_evaluates_and_ranks_baselines(name: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ["--train.max-steps", "6", "--optim.dense-lr", "0.01"]
    main(["train", "--data", str(data), "--run", str(run), "--model.name", name, *SMALL, *FEATURES, *steps])
    with load_run(str(run)) as opened:
        result = evaluate(
            opened.model.model_parallel,
            opened.model.model.ranker,
            Dataset(str(data), CARD),
            "test",
            opened.config,
            opened.process,
        )
        lists = score_session_lists(opened, "valid", str(tmp_path / "lists"), 5, 30.0)
    assert result["targets"] > 0
    assert list(result["actions"]) == ["like", "comment", "follow", "click"]
    assert all(math.isfinite(row["ne"]) for row in result["actions"].values())
    assert list(result["time"]) == ["like", "follow", "exit"]
    assert all(math.isfinite(row["mae_log"]) for row in result["time"].values())
    assert list(result["objectives"]) == ["glance", "effective"]
    assert result["generator_vs_head"]["watch_time"].keys() == {"generator"}, "the time of exit is the watch time"
    assert result["unexplored_mass"]["max"] == 0
    assert 0 < result["order_violations"] < 1
    loss = result["loss"]
    assert not any(loss[term] for term in ("order", "draft_action", "draft_time"))
    assert loss["total"] == pytest.approx(
        sum(loss[term] for term in ("action", "time", "label", "glance", "effective"))
    )
    assert lists is not None
    assert lists.objectives == ("like", "comment", "follow", "click", "glance", "effective", "watch_time")
    assert lists.events.shape[1] == 8 + 16, "item, and the mean of time and action embeddings"

    ranking = rank_run(str(run), "nobody")
    assert ranking.sort_by == "watch"
    watch = [candidate.expected_watch_s for candidate in ranking.candidates]
    assert watch == sorted(watch, reverse=True)
    assert len(set(watch)) > 1
    assert all(candidate.timeline == [] and candidate.timeline_probability is None for candidate in ranking.candidates)

    with pytest.raises(UserError, match=rf"checkpoint has model\.name={name} but the config has a2gen"):
        train(small_config(), str(data), str(run))


@pytest.mark.parametrize("name", ["mmoe", "ple"])
@pytest.mark.parametrize(
    "options",
    [
        ["--optim.multitask", "adatask"],
        [
            "--train.forkmerge.merge-interval-epochs",
            "1",
            "--train.forkmerge.branch-loss-weights",
            "[{}, {time_weight: 0, glance: 2}]",
        ],
    ],
)
def test_multitask_options_train_and_resume(options: list[str], name: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "--data", str(data), "--run", str(run), "--model.name", name, *SMALL, *FEATURES, *options]
    main([*command, "--train.epochs", "1"])
    main([*command, "--train.epochs", "2"])
    with load_run(str(run)) as opened:
        result = evaluate(
            opened.model.model_parallel,
            opened.model.model.ranker,
            Dataset(str(data), CARD),
            "test",
            opened.config,
            opened.process,
        )
    assert math.isfinite(result["loss"]["total"])
    assert opened.step == 2 * TrainState.read(RunDir(str(run)).checkpoint(opened.step // 2)).step > 0
