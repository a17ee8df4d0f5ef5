"""A baseline from the command that trains it to a ranked list, an evaluation and session lists for an ensemble."""

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
from tests.helpers.cards import make_card, small_config, write_dataset

CARD = make_card()
SMALL = [
    "--model.dim",
    "8",
    "--model.num_heads",
    "2",
    "--model.time_buckets",
    "8",
    "--loader.max_impressions_per_batch",
    "200",
]
SWITCHES = [
    "--model.feedback_encoding",
    "dual_view_full",
    "--model.session_features",
    "true",
    "--model.predict_objectives",
    "true",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data", CARD, windows=25)


@pytest.mark.parametrize("name", ["mmoe", "ple", "hstu"])
def test_trained_evaluated_ranked_and_scored(name: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ["--train.max_steps", "6", "--optim.dense_lr", "0.01"]
    main(["train", "--data", str(data), "--run", str(run), "--model.name", name, *SMALL, *SWITCHES, *steps])
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
    assert all(
        candidate.timeline == [] and math.isnan(candidate.timeline_probability) for candidate in ranking.candidates
    )

    with pytest.raises(UserError, match=r"model\.name = " + name):
        train(small_config(), str(data), str(run))


@pytest.mark.parametrize("name", ["mmoe", "ple"])
@pytest.mark.parametrize(
    "ways",
    [
        ["--optim.multitask", "adatask"],
        [
            "--train.forkmerge.merge_interval_epochs",
            "1",
            "--train.forkmerge.branch_loss_weights",
            "[{}, {time: 0, glance: 2}]",
        ],
    ],
)
def test_ways_to_train_are_options_of_the_command(ways: list[str], name: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begun = ["train", "--data", str(data), "--run", str(run), "--model.name", name, *SMALL, *SWITCHES, *ways]
    main([*begun, "--train.epochs", "1"])
    main([*begun, "--train.epochs", "2"])
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
