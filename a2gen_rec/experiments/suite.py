"""Suite of an experiment: datasets, models, ablations, seeds and tuning.

::

    datasets:
      jd: {source: jd, raw: jd-micro-behaviors/JD-Applicances, config: ../jd.yaml}
    models:
      a2gen: {}
      ple: {model.name: ple}
    ablations:                      # use the tuned settings of their model
      a2gen:
        without times: {model.action_times: false}
    seeds: [0, 1, 2]
    tuning:                         # the same number of trials for each model
      trials: 4
      space: {optim.dense_lr: [0.001, 0.002, 0.004], model.dropout: [0.1, 0.3]}
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.config.parse import config_from_dict
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils import paths

Overrides = dict[str, Any]
"""Full name of a setting, such as ``optim.dense_lr``, -> value."""
SearchMethod = Literal["random", "grid"]
SelectionMetric = Literal["auc", "loss"]

_NAME = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True)
class Dataset:
    """Dataset with the settings that all models share.

    Attributes:
        name: Name of the dataset.
        settings: Settings of the configuration file and of the suite, nested as in a file.
        data: Directory of a prepared dataset; empty if it is prepared from a log.
        source: Kind of the log, as for `a2gen prepare`.
        raw: Path of the log.
        spec: Description of the log.
        simulate: Settings of a simulated log; None for a real one.
        prepare: Settings of the preparation.
        ablations: Whether ablations are run on the dataset.
    """

    name: str
    settings: Mapping[str, Any]
    data: str = ""
    source: str = ""
    raw: str = ""
    spec: str = ""
    simulate: Mapping[str, Any] | None = None
    prepare: Mapping[str, Any] = field(default_factory=dict)
    ablations: bool = True

    @property
    def preparation(self) -> dict[str, Any]:
        """Log and settings from which the dataset is prepared; different values mean different data."""
        names = ("source", "raw", "spec", "simulate", "prepare")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Model:
    """Model, defined by its differences from the settings of the dataset.

    Attributes:
        name: Name of the model.
        overrides: Settings that differ.
        ablation_of: Full model of an ablation; empty for full models.
    """

    name: str
    overrides: Overrides
    ablation_of: str = ""


@dataclass(frozen=True)
class Tuning:
    """Tuning budget of every model, on validation.

    Attributes:
        trials: Number of trials per model, all with the suite's first seed.
        search: ``random`` samples distinct combinations of the space, ``grid`` uses all.
        seed: Random seed of the search.
        select: Selection metric at the best checkpoint: mean AUC or loss.
        space: Setting -> values to try.
        per_model_space: Model -> additional or replaced settings of the space.
    """

    trials: int
    search: SearchMethod
    seed: int
    select: SelectionMetric
    space: Mapping[str, list[Any]]
    per_model_space: Mapping[str, Mapping[str, list[Any]]]

    def space_for(self, model: str) -> dict[str, list[Any]]:
        """Return the full search space of a model."""
        return {**self.space, **self.per_model_space.get(model, {})}


@dataclass(frozen=True)
class Suite:
    """Suite of an experiment; ``models`` holds models, then ablations."""

    datasets: tuple[Dataset, ...]
    models: tuple[Model, ...]
    seeds: tuple[int, ...]
    tuning: Tuning | None

    def models_for(self, dataset: Dataset) -> list[Model]:
        """Return the models to run on a dataset."""
        return [model for model in self.models if dataset.ablations or not model.ablation_of]

    def trials(self, model: Model) -> list[Overrides]:
        """Return the trials of a model: the same number for each, none for ablations or without tuning."""
        if self.tuning is None or model.ablation_of:
            return []
        space, tuning = self.tuning.space_for(model.name), self.tuning
        sizes = [len(values) for values in space.values()]
        indices = range(math.prod(sizes))
        if tuning.search == "random":
            rng = np.random.default_rng(tuning.seed)
            indices = rng.choice(len(indices), tuning.trials, replace=False).tolist()
        points = [np.unravel_index(index, sizes) for index in indices]
        return [{name: values[i] for (name, values), i in zip(space.items(), point, strict=True)} for point in points]


def read_suite(file: str) -> Suite:
    """Read and check a suite; paths of configuration files are relative to it.

    Raises:
        ConfigError: An entry is invalid.
        UserError: The suite or a configuration file cannot be read.
    """
    raw = _Node(paths.read_yaml(file), file)
    raw.check_keys("datasets", "models", "ablations", "seeds", "tuning")
    suite = Suite(
        datasets=tuple(_dataset(name, entry, file) for name, entry in raw.child("datasets").entries()),
        models=tuple(_models(raw)),
        seeds=tuple(raw.child("seeds").distinct_integers()),
        tuning=_tuning(raw.child("tuning")) if "tuning" in raw.value else None,
    )
    _check(suite, file)
    return suite


def merge_overrides(base: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return the nested settings ``base`` with ``overrides`` applied."""
    merged = {name: merge_overrides(value, {}) if isinstance(value, Mapping) else value for name, value in base.items()}
    for name, value in overrides.items():
        section, _, rest = name.partition(".")
        if rest:
            inner = merged.get(section)
            merged[section] = merge_overrides(inner if isinstance(inner, Mapping) else {}, {rest: value})
        else:
            merged[section] = value
    return merged


@dataclass(frozen=True)
class _Node:
    """Value in the suite file.

    Attributes:
        value: Parsed YAML value.
        path: File and keys of the value, for error messages.
    """

    value: Any
    path: str

    def error(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: {reason}")

    def child(self, name: str) -> "_Node":
        if name not in self.mapping():
            raise self.error(f"{name} is missing")
        return _Node(self.value[name], f"{self.path}, {name}")

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.error(f"must map names to values, not {self.value!r}")
        return self.value

    def check_keys(self, *names: str) -> None:
        for name in self.mapping():
            if name not in names:
                raise self.error(f"unknown key {name!r}; choose one of {', '.join(names)}")

    def entries(self) -> list[tuple[str, "_Node"]]:
        """Return the named entries, at least one; names must be valid directory names."""
        if not self.mapping():
            raise self.error("is empty")
        for name in self.value:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise self.error(f"invalid name {name!r}: use letters, digits, '_', '.', '+' or '-'")
        return [(name, self.child(name)) for name in self.value]

    def distinct_integers(self) -> list[int]:
        value = self.value
        valid = isinstance(value, list) and value and all(type(number) is int and number >= 0 for number in value)
        if not valid or len(set(value)) < len(value):
            raise self.error(f"must be a list of distinct non-negative integers, not {value!r}")
        return list(value)

    def integer(self, name: str, min_value: int, default: int | None = None) -> int:
        value = self.value.get(name, default)
        if type(value) is not int or value < min_value:
            raise self.error(f"{name} {value!r} must be an integer of at least {min_value}")
        return value

    def text(self, name: str) -> str:
        value = self.value.get(name, "")
        if not isinstance(value, str):
            raise self.error(f"{name} {value!r} must be a string")
        return value

    def choice(self, name: str, choices: tuple[str | bool, ...]) -> Any:
        value = self.value.get(name, choices[0])
        if value not in choices:
            raise self.error(f"{name} {value!r} must be one of {', '.join(map(str, choices)).lower()}")
        return value

    def overrides(self) -> Overrides:
        """Return values by full names of settings; empty for an empty entry."""
        if self.value is None:
            return {}
        for name in self.mapping():
            if not isinstance(name, str) or "." not in name:
                raise self.error(f"{name!r} must be a setting's full name, such as model.dim")
            if name == "train.seed":
                raise self.error("train.seed is set by the suite's seeds")
        return dict(self.value)

    def space(self) -> dict[str, list[Any]]:
        for name, values in self.overrides().items():
            if not isinstance(values, list) or not values:
                raise self.error(f"{name} must list the values to try, not {values!r}")
        return self.overrides()


def _dataset(name: str, node: _Node, file: str) -> Dataset:
    node.check_keys("data", "source", "raw", "spec", "simulate", "prepare", "config", "settings", "ablations")
    entry = node.value
    if ("data" in entry) + ("source" in entry) + ("simulate" in entry) != 1:
        raise node.error("must have exactly one of data (a directory), source (with raw) and simulate")
    if ("source" in entry) != ("raw" in entry):
        raise node.error("source and raw require each other")
    settings: Mapping[str, Any] = {}
    if config := node.text("config"):
        config_file = paths.resolve_relative(paths.dirname(paths.abspath(file)), config)
        settings = _Node(paths.read_yaml(config_file) or {}, config_file).mapping()
        settings = {
            section: values for section, values in settings.items() if section != "data"
        }  # in the config of a run
    overrides = node.child("settings").overrides() if "settings" in entry else {}
    return Dataset(
        name,
        merge_overrides(settings, overrides),
        node.text("data"),
        node.text("source"),
        node.text("raw"),
        node.text("spec"),
        _fields(node, "simulate", SimulateConfig) if "simulate" in entry else None,
        _fields(node, "prepare", PrepareConfig) if "prepare" in entry else {},
        node.choice("ablations", (True, False)),
    )


def _fields(node: _Node, name: str, config_class: type[SimulateConfig] | type[PrepareConfig]) -> dict[str, Any]:
    child = node.child(name)
    values = {} if child.value is None else child.mapping()
    child = _Node(values, child.path)
    child.check_keys(*config_class.__dataclass_fields__)
    try:
        config_class(**values)
    except (ConfigError, TypeError) as error:
        raise child.error(str(error)) from error
    return values


def _models(raw: _Node) -> list[Model]:
    models = [Model(name, entry.overrides()) for name, entry in raw.child("models").entries()]
    by_name = {model.name: model for model in models}
    names = set(by_name)
    for name, variants in raw.child("ablations").entries() if "ablations" in raw.value else []:
        if name not in by_name:
            raise _Node(None, f"{raw.path}, ablations").error(f"unknown model {name!r}")
        for variant, entry in variants.entries():
            if variant in names:
                raise variants.error(f"duplicate name {variant!r}")
            names.add(variant)
            models.append(Model(variant, by_name[name].overrides | entry.overrides(), ablation_of=name))
    return models


def _tuning(node: _Node) -> Tuning:
    node.check_keys("trials", "search", "seed", "select", "space", "per_model_space")
    return Tuning(
        trials=node.integer("trials", 1),
        search=node.choice("search", get_args(SearchMethod)),
        seed=node.integer("seed", 0, default=0),
        select=node.choice("select", get_args(SelectionMetric)),
        space=node.child("space").space(),
        per_model_space={name: entry.space() for name, entry in node.child("per_model_space").entries()}
        if "per_model_space" in node.value
        else {},
    )


def _check(suite: Suite, file: str) -> None:
    """Check settings that would otherwise fail in a single run later."""
    if suite.tuning is not None:
        node = _Node(None, f"{file}, tuning")
        for name in suite.tuning.per_model_space:
            if name not in [model.name for model in suite.models if not model.ablation_of]:
                raise _Node(None, f"{node.path}, per_model_space").error(f"unknown model {name!r}")
        for model in suite.models:
            space = {} if model.ablation_of else suite.tuning.space_for(model.name)
            for name in space.keys() & model.overrides.keys():
                raise node.error(f"{name} is both tuned and set by model {model.name!r}")
            size, trials = math.prod(len(values) for values in space.values()), suite.tuning.trials
            if not model.ablation_of and (trials > size or (suite.tuning.search == "grid" and trials != size)):
                raise node.error(f"trials {trials}: the space of model {model.name!r} has {size} combinations")
    for number, dataset in enumerate(suite.datasets):
        for model in suite.models_for(dataset):
            # Trials are the same on every dataset, and parsing settings is slow.
            for trial in (suite.trials(model) if number == 0 else []) or [{}]:
                settings = merge_overrides(dataset.settings, model.overrides | trial)
                try:
                    config_from_dict(settings)
                except ConfigError as error:
                    raise ConfigError(f"{file}: {model.name} on {dataset.name}: {error}") from error
