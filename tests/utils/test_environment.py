"""Git revision recorded with results."""

import subprocess
from pathlib import Path

import pytest

from a2gen_rec.utils import environment

pytestmark = pytest.mark.processes


def test_only_changed_code_makes_the_revision_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "package" / "environment.py"))
    assert environment.git_revision() == ""
    for file in ("package/environment.py", "benchmarks/results/x.json", "page.md"):
        (tmp_path / file).touch()
    git("init")
    assert environment.git_revision() == "", "the file is in the checkout but not tracked"
    git("add", ".")
    git("commit", "--message", "first")
    head = git("rev-parse", "--short=10", "HEAD")
    (results / "x.json").write_text("1")
    (tmp_path / "page.md").write_text("1")
    assert environment.git_revision(["benchmarks/results", "page.md"]) == head
    assert environment.git_revision() == f"{head}-dirty"
    (tmp_path / "package" / "environment.py").write_text("1")
    assert environment.git_revision(["benchmarks/results", "page.md"]) == f"{head}-dirty"
