"""A suite: which models are compared on which datasets, with which seeds and how much tuning.

::

    datasets:
      jd: {source: jd, raw: jd-micro-behaviors/JD-Applicances, config: ../jd.yaml}
    models:
      a2gen: {}
      ple: {model.name: ple}
    ablations:                      # run with the tuned settings of their model, not tuned themselves
      a2gen:
        without times: {model.action_times: false}
    seeds: [0, 1, 2]
    tuning:                         # as many trials for each model
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
"""Values of settings by their full names, such as ``optim.dense_lr``."""
SearchMethod = Literal["random", "grid"]
SelectionMetric = Literal["auc", "loss"]

_NAME = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True)
class Dataset:
    """A dataset, and the settings that all models have on it.

    Attributes:
        settings: of the configuration file, and those the suite gives itself, nested as in a file.
        data: its folder; empty if it is made of a log.
        source, raw, spec: kind, place and description of that log, as `a2gen prepare` takes them.
        simulate: settings of a simulated log; None for a real one.
        prepare: settings of its preparation.
        ablations: whether they are run on it too.
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
        """What it is made of, and how: two that differ in it are different data."""
        names = ("source", "raw", "spec", "simulate", "prepare")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Model:
    """A model by what its settings differ in from the dataset's; ``of``: the model whose ablation it is, if it is."""

    name: str
    overrides: Overrides
    ablation_of: str = ""


@dataclass(frozen=True)
class Tuning:
    """The budget that every model has, on validation.

    Attributes:
        trials: settings tried for each model, all with the suite's first seed.
        search: ``random`` distinct combinations of the space, or all of them (``grid``).
        select: what the best trial is best in: mean AUC or loss, at its best checkpoint.
        space: values to try, by setting; ``own``: those of single models beside them.
    """

    trials: int
    search: SearchMethod
    seed: int
    select: SelectionMetric
    space: Mapping[str, list[Any]]
    per_model_space: Mapping[str, Mapping[str, list[Any]]]

    def space_for(self, model: str) -> dict[str, list[Any]]:
        """The whole space of a model."""
        return {**self.space, **self.per_model_space.get(model, {})}


@dataclass(frozen=True)
class Suite:
    """What is compared. ``models`` are the models and then the ablations."""

    datasets: tuple[Dataset, ...]
    models: tuple[Model, ...]
    seeds: tuple[int, ...]
    tuning: Tuning | None

    def models_for(self, dataset: Dataset) -> list[Model]:
        """The models that are run on a dataset."""
        return [model for model in self.models if dataset.ablations or not model.ablation_of]

    def trials(self, model: Model) -> list[Overrides]:
        """What is tried for a model: the same number for each, none for ablations or without tuning."""
        if self.tuning is None or model.ablation_of:
            return []
        space, tuning = self.tuning.space_for(model.name), self.tuning
        sizes = [len(values) for values in space.values()]
        chosen = range(math.prod(sizes))
        if tuning.search == "random":
            rng = np.random.default_rng(tuning.seed)
            chosen = rng.choice(len(chosen), tuning.trials, replace=False).tolist()
        places = [np.unravel_index(number, sizes) for number in chosen]
        return [{name: values[at] for (name, values), at in zip(space.items(), place, strict=True)} for place in places]


def read_suite(file: str) -> Suite:
    """Read and check a suite; configuration files are relative to it.

    Raises:
        ConfigError: naming what in it cannot be used.
        UserError: it, or a configuration file, cannot be read.
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
    """The settings ``base``, nested as in a file, with ``overrides``."""
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
    """A value in the suite's file, and where it stands there."""

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
                raise self.error(f"{name!r} is none of {', '.join(names)}")

    def entries(self) -> list[tuple[str, "_Node"]]:
        """What stands under names, of which there is one at least and each can be a folder's."""
        if not self.mapping():
            raise self.error("is empty")
        for name in self.value:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise self.error(f"{name!r} cannot be a name: letters, digits and _ . + - please")
        return [(name, self.child(name)) for name in self.value]

    def distinct_integers(self) -> list[int]:
        value = self.value
        good = isinstance(value, list) and value and all(type(number) is int and number >= 0 for number in value)
        if not good or len(set(value)) < len(value):
            raise self.error(f"must be a list of different whole numbers, not {value!r}")
        return list(value)

    def integer(self, name: str, min_value: int, default: int | None = None) -> int:
        value = self.value.get(name, default)
        if type(value) is not int or value < min_value:
            raise self.error(f"{name} {value!r} must be a whole number of at least {min_value}")
        return value

    def text(self, name: str) -> str:
        value = self.value.get(name, "")
        if not isinstance(value, str):
            raise self.error(f"{name} {value!r} must be text")
        return value

    def choice(self, name: str, kinds: tuple[str | bool, ...]) -> Any:
        value = self.value.get(name, kinds[0])
        if value not in kinds:
            raise self.error(f"{name} {value!r} must be one of {', '.join(map(str, kinds)).lower()}")
        return value

    def overrides(self) -> Overrides:
        """Values by the full names of settings; nothing if left empty."""
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


def _dataset(name: str, place: _Node, file: str) -> Dataset:
    place.check_keys("data", "source", "raw", "spec", "simulate", "prepare", "config", "settings", "ablations")
    entry = place.value
    if ("data" in entry) + ("source" in entry) + ("simulate" in entry) != 1:
        raise place.error("must have one of data (a folder), source (with raw) and simulate")
    if ("source" in entry) != ("raw" in entry):
        raise place.error("source and raw go together")
    settings: Mapping[str, Any] = {}
    if config := place.text("config"):
        given = paths.resolve_relative(paths.dirname(paths.abspath(file)), config)
        settings = _Node(paths.read_yaml(given) or {}, given).mapping()
        settings = {section: values for section, values in settings.items() if section != "data"}  # a run's has it
    own = place.child("settings").overrides() if "settings" in entry else {}
    return Dataset(
        name,
        merge_overrides(settings, own),
        place.text("data"),
        place.text("source"),
        place.text("raw"),
        place.text("spec"),
        _fields(place, "simulate", SimulateConfig) if "simulate" in entry else None,
        _fields(place, "prepare", PrepareConfig) if "prepare" in entry else {},
        place.choice("ablations", (True, False)),
    )


def _fields(place: _Node, name: str, kind: type[SimulateConfig] | type[PrepareConfig]) -> dict[str, Any]:
    found = place.child(name)
    values = {} if found.value is None else found.mapping()
    found = _Node(values, found.path)
    found.check_keys(*kind.__dataclass_fields__)
    try:
        kind(**values)
    except (ConfigError, TypeError) as error:
        raise found.error(str(error)) from error
    return values


def _models(raw: _Node) -> list[Model]:
    models = [Model(name, entry.overrides()) for name, entry in raw.child("models").entries()]
    whole = {model.name: model for model in models}
    taken = set(whole)
    for name, variants in raw.child("ablations").entries() if "ablations" in raw.value else []:
        if name not in whole:
            raise _Node(None, f"{raw.path}, ablations").error(f"{name!r} is none of the models")
        for variant, entry in variants.entries():
            if variant in taken:
                raise variants.error(f"{variant!r} is the name of another model")
            taken.add(variant)
            models.append(Model(variant, whole[name].overrides | entry.overrides(), ablation_of=name))
    return models


def _tuning(place: _Node) -> Tuning:
    place.check_keys("trials", "search", "seed", "select", "space", "per_model_space")
    return Tuning(
        trials=place.integer("trials", 1),
        search=place.choice("search", get_args(SearchMethod)),
        seed=place.integer("seed", 0, default=0),
        select=place.choice("select", get_args(SelectionMetric)),
        space=place.child("space").space(),
        per_model_space={name: entry.space() for name, entry in place.child("per_model_space").entries()}
        if "per_model_space" in place.value
        else {},
    )


def _check(suite: Suite, file: str) -> None:
    """Refuse at once what would fail as one run among many."""
    if suite.tuning is not None:
        place = _Node(None, f"{file}, tuning")
        for name in suite.tuning.per_model_space:
            if name not in [model.name for model in suite.models if not model.ablation_of]:
                raise _Node(None, f"{place.path}, per_model_space").error(f"{name!r} is none of the models")
        for model in suite.models:
            space = {} if model.ablation_of else suite.tuning.space_for(model.name)
            for name in space.keys() & model.overrides.keys():
                raise place.error(f"{name} is tuned, and set by model {model.name!r}")
            size, trials = math.prod(len(values) for values in space.values()), suite.tuning.trials
            if not model.ablation_of and (trials > size or (suite.tuning.search == "grid" and trials != size)):
                raise place.error(f"trials {trials}: the space of model {model.name!r} has {size} combinations")
    for number, dataset in enumerate(suite.datasets):
        for model in suite.models_for(dataset):
            # What is tried is the same on every dataset, and reading settings takes a while.
            for tried in (suite.trials(model) if number == 0 else []) or [{}]:
                settings = merge_overrides(dataset.settings, model.overrides | tried)
                try:
                    config_from_dict(settings)
                except ConfigError as error:
                    raise ConfigError(f"{file}: {model.name} on {dataset.name}: {error}") from error
