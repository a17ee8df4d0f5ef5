"""Parsing and validation of suites."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from a2gen_rec.errors import ConfigError
from a2gen_rec.experiments.suite import merge_overrides, read_suite
from tests.helpers import CONFIGS

SHIPPED = CONFIGS / "experiments"
SUITE: dict[str, Any] = {
    "datasets": {
        "shop": {"source": "jd", "raw": "log", "config": "base.yaml", "prepare": {"max_history": 9}},
        "local": {"data": "folder", "settings": {"train.epochs": 1}, "ablations": False},
        "simulated": {"simulate": None},
    },
    "models": {"a2gen": None, "ple": {"model.name": "ple"}},
    "ablations": {"a2gen": {"no gate": {"model.use_head_gate": False}}},
    "seeds": [3, 1],
    "tuning": {
        "trials": 4,
        "space": {"optim.dense_lr": [0.1, 0.2, 0.3], "model.dropout": [0.0, 0.5]},
        "per_model_space": {"ple": {"model.task_experts": [1, 2]}},
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("data: of_a_run\nmodel: {dim: 16}\nloss: {objective_weights: {glance: 0.5}}\n")
    return tmp_path / "suite.yaml"


def changed(where: str, value: Any) -> dict[str, Any]:
    """Return the valid suite with one entry changed; ``...`` deletes it."""
    suite = copy.deepcopy(SUITE)
    *parents, last = where.split("/")
    node = suite
    for name in parents:
        node = node[name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return suite


def test_reads_a_suite(file: Path) -> None:
    file.write_text(yaml.safe_dump(SUITE, sort_keys=False))
    suite = read_suite(str(file))
    shop, local, simulated = suite.datasets
    assert shop.settings == {"model": {"dim": 16}, "loss": {"objective_weights": {"glance": 0.5}}}
    assert (shop.source, shop.raw, shop.prepare) == ("jd", "log", {"max_history": 9})
    assert (local.data, local.settings, local.simulate) == ("folder", {"train": {"epochs": 1}}, None)
    assert simulated.simulate == {}
    assert [(model.name, model.ablation_of, model.overrides) for model in suite.models] == [
        ("a2gen", "", {}),
        ("ple", "", {"model.name": "ple"}),
        ("no gate", "a2gen", {"model.use_head_gate": False}),
    ]
    assert suite.seeds == (3, 1)
    assert [[model.name for model in suite.models_for(dataset)] for dataset in suite.datasets] == [
        ["a2gen", "ple", "no gate"],
        ["a2gen", "ple"],
        ["a2gen", "ple", "no gate"],
    ]


def test_trials_are_distinct_and_equally_many_per_model(file: Path) -> None:
    file.write_text(yaml.safe_dump(SUITE))
    suite = read_suite(str(file))
    a2gen, ple, ablation = ([tuple(sorted(trial.items())) for trial in suite.trials(model)] for model in suite.models)
    assert ablation == []
    assert len(set(a2gen)) == len(a2gen) == len(set(ple)) == len(ple) == 4
    full_space = {
        (("model.dropout", dropout), ("optim.dense_lr", lr)) for lr, dropout in product([0.1, 0.2, 0.3], [0.0, 0.5])
    }
    assert set(a2gen) < full_space
    assert {name for trial in ple for name, _ in trial} == {"optim.dense_lr", "model.dropout", "model.task_experts"}
    assert suite.trials(suite.models[0]) == read_suite(str(file)).trials(suite.models[0]), (
        "trials are determined by the suite's seed"
    )

    tuning = SUITE["tuning"] | {
        "search": "grid",
        "trials": 6,
        "per_model_space": {"a2gen": {"optim.dense_lr": [1.0, 2.0, 3.0]}},
    }
    file.write_text(yaml.safe_dump(SUITE | {"tuning": tuning}))
    suite = read_suite(str(file))
    trials = [tuple(sorted(trial.items())) for trial in suite.trials(suite.models[1])]
    assert len(trials) == 6
    assert set(trials) == full_space


def test_without_tuning_there_are_no_trials(file: Path) -> None:
    file.write_text(yaml.safe_dump(changed("tuning", ...)))
    suite = read_suite(str(file))
    assert [suite.trials(model) for model in suite.models] == [[], [], []]


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        ("seed", [1], "unknown key 'seed'; choose one of datasets, models"),
        ("datasets", {}, "datasets: is empty"),
        ("datasets", ..., "datasets is missing"),
        ("datasets/local/data", ..., "datasets, local: must have exactly one of data"),
        ("datasets/shop/raw", ..., "datasets, shop: source and raw require each other"),
        ("datasets/local/raws", "x", "datasets, local: unknown key 'raws'; choose one of"),
        ("datasets/local/data", 3, "datasets, local: data 3 must be a string"),
        ("datasets/local/ablations", "no", "datasets, local: ablations 'no' must be one of true, false"),
        ("datasets/a:b", {"data": "x"}, "datasets: invalid name 'a:b': use letters"),
        ("datasets/..", {"data": "x"}, "datasets: invalid name '..': use letters"),
        ("datasets/local/settings", {"epochs": 1}, "local, settings: 'epochs' must be a setting's full name"),
        ("datasets/shop/prepare", {"histry": 1}, "shop, prepare: unknown key 'histry'; choose one of"),
        ("datasets/simulated/simulate", {"users": 0}, "simulated, simulate: users 0 must be at least 1"),
        ("models/ple", ["ple"], "models, ple: must map names to values"),
        ("models/ple", {"model.nmae": "ple"}, "ple on shop: unknown setting 'model.nmae'"),
        ("models/ple", {"modle.name": "ple"}, "ple on shop: unknown section 'modle'"),
        ("models/ple", {"model.dim": 30}, "ple on shop: model.dim 30 must be"),
        ("models/ple", {"train.seed": 1}, "models, ple: train.seed is set by the suite's seeds"),
        ("models/ple", {"model.dropout": 0.1}, "tuning: model.dropout is both tuned and set by model 'ple'"),
        ("ablations", {"hstu": {"x": {}}}, "ablations: unknown model 'hstu'"),
        ("ablations/a2gen/ple", {}, "ablations, a2gen: duplicate name 'ple'"),
        ("seeds", [0, 0], "seeds: must be a list of distinct non-negative integers"),
        ("seeds", [], "seeds: must be a list"),
        ("seeds", [True], "seeds: must be a list"),
        ("seeds", 3, "seeds: must be a list"),
        ("tuning/trials", 7, "tuning: trials 7: the space of model 'a2gen' has 6 combinations"),
        ("tuning/trials", 0, "tuning: trials 0 must be an integer of at least 1"),
        ("tuning/search", "grid", "tuning: trials 4: the space of model 'a2gen' has 6 combinations"),
        ("tuning/search", "bayes", "tuning: search 'bayes' must be one of random, grid"),
        ("tuning/space/model.dropout", 0.1, "tuning, space: model.dropout must list the values to try, not 0.1"),
        ("tuning/space/model.dropout", [0.1, 1.5], "a2gen on shop: model.dropout 1.5 must be in [0, 1)"),
        (
            "tuning/per_model_space",
            {"no gate": {"model.num_layers": [1]}},
            "tuning, per_model_space: unknown model 'no gate'",
        ),
    ],
)
def test_rejects_invalid_entries_in_one_line(where: str, value: Any, named: str, file: Path) -> None:
    suite = changed(where, value)
    file.write_text(yaml.safe_dump(suite, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        read_suite(str(file))
    message = str(caught.value)
    assert message.startswith(str(file))
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["- a\n- b\n", "datasets: [\n", "", "3"])
def test_rejects_files_that_are_not_a_suite(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"suite\.yaml: "):
        read_suite(str(file))


def test_overrides_are_merged() -> None:
    base = {"model": {"dim": 8}, "loss": {"objective_weights": {"glance": 1.0}}}
    merged = merge_overrides(base, {"model.num_heads": 2, "loss.objective_weights.effective": 0.5, "train.seed": 4})
    assert merged == {
        "model": {"dim": 8, "num_heads": 2},
        "loss": {"objective_weights": {"glance": 1.0, "effective": 0.5}},
        "train": {"seed": 4},
    }
    assert base == {"model": {"dim": 8}, "loss": {"objective_weights": {"glance": 1.0}}}, "the base is unchanged"


def test_shipped_suites_are_valid() -> None:
    suites = {file.name: read_suite(str(file)) for file in sorted(SHIPPED.glob("*.yaml"))}
    assert len(suites) >= 6
    main = suites["main.yaml"]
    assert [model.name for model in main.models if not model.ablation_of] == [
        "a2gen",
        "a2gen without tower",
        "mmoe",
        "ple",
        "adatask",
        "forkmerge",
        "hstu",
        "gbdt",
    ]
    assert [dataset.name for dataset in main.datasets] == ["simulated", "kuairand", "jd", "rec_tmall"]
    assert len(main.seeds) >= 3
    for suite in suites.values():
        budget = {len(suite.trials(model)) for model in suite.models if not model.ablation_of}
        assert len(budget) == 1
        changes = [model.overrides for model in suite.models if model.ablation_of]
        assert all(changes)
        assert len({str(change) for change in changes}) == len(changes)
