#!/usr/bin/env bash
# jsonargparse 4.53.0: one key of a dict field is merged into the default on the command line and replaces the
# default in YAML.
#
# Expected: `--model.weights.like=3` and the YAML text `model: {weights: {like: 3}}` mean the same. They do for
# the fields of a nested dataclass: a file with one field keeps the defaults of the other fields.
#
# Seen: for a dataclass with weights: dict[str, float] = {"like": 1, "share": 2}, the command line gives
# {"like": 3, "share": 2} and the YAML file gives {"like": 3}: the weight of share is gone. A second file with
# another key removes the first.
#
# Hurt: loss weights, task weights and learning rates in a dict. An override that was tried on the command line
# and then moved into a file trains another model. Workaround: a dataclass with a field per key, an empty
# default, or a check that all keys are present.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jsonargparse[signatures]==4.53.0 PyYAML==6.0.3
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from jsonargparse import ArgumentParser


@dataclass
class Nested:
    like: float = 1.0
    share: float = 2.0


@dataclass
class Model:
    nested: Nested = field(default_factory=Nested)
    weights: dict[str, float] = field(default_factory=lambda: {"like": 1.0, "share": 2.0})


print("jsonargparse", version("jsonargparse"))
parser = ArgumentParser(exit_on_error=False)
parser.add_argument("--config", action="config")
parser.add_argument("--model", type=Model)
Path("like.yaml").write_text("model:\n  nested:\n    like: 3\n  weights:\n    like: 3\n")
Path("share.yaml").write_text("model:\n  weights:\n    share: 5\n")
from_line = parser.parse_args(["--model.weights.like=3"]).model.weights
model = parser.parse_args(["--config=like.yaml"]).model
nested, from_file = vars(model.nested), model.weights
from_files = parser.parse_args(["--config=like.yaml", "--config=share.yaml"]).model.weights
print("dataclass from the file:", nested)
print("command line:", from_line, "\nfile:        ", from_file, "\ntwo files:   ", from_files, "\nexpected: equal for line and file")
sys.exit(not (from_line == {"like": 3.0, "share": 2.0} and from_file == {"like": 3.0} and from_files == {"share": 5.0}
              and nested == {"like": 3.0, "share": 2.0}))
PYTHON
