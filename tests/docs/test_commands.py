"""README and documentation: every command and Python block runs on small data, or states why it does not.

HTML comments before a block control it: ``not run: REASON`` skips it, ``file: NAME`` writes its text to a file. The
comment ``setup: PARTS`` anywhere in a page states what it needs: the outputs of the quickstart (``data``, ``run``) with
an exported model (``model``), and a running service (``service``).
"""

import re
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from a2gen_rec.cli.main import COMMANDS, main
from tests.helpers import REPOSITORY
from tests.helpers.service import running

pytestmark = pytest.mark.processes

QUICKSTART = REPOSITORY / "docs" / "getting-started" / "quickstart.md"
NOTEBOOK = REPOSITORY / "docs" / "tutorials" / "explore-a-run.ipynb"
PAGES = [
    REPOSITORY / "README.md",
    *sorted(page for page in (REPOSITORY / "docs").rglob("*.md") if page != NOTEBOOK.with_suffix(".md")),
]
BLOCK = re.compile(
    r"((?:^<!-- [^\n]* -->\n)*)^```(bash|console|python|csv|yaml|text)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
SMALL = {
    "simulate": "--users 40 --items 50 --impressions-per-user 20",
    "spec": "--threads 1",
    "prepare": "--num-partitions 1 --threads 1",
    "train": "--train.max-steps 3 --train.validation-interval 3 --model.dim 16",
    "ensemble train": "--epochs 1 --formula-trials 2",
    "export": "--max-auc-drop 1",
    "backfill": "--threads 1",
}
"""Options added to the documented commands: small sizes, and no bound on the AUC of a barely trained model."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the comments before it."""

    language: str
    text: str
    not_run: str
    file: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.not_run


def read_blocks(page: Path) -> list[Block]:
    blocks = []
    for comments, language, text in BLOCK.findall(page.read_text()):
        marks = dict(re.findall(r"<!-- ([a-z ]+): (.*) -->", comments))
        blocks.append(Block(language, text, marks.get("not run", ""), marks.get("file", "")))
    return blocks


def read_setup(page: Path) -> set[str]:
    parts = re.findall(r"^<!-- setup: (.*) -->$", page.read_text(), re.MULTILINE)
    return {part for line in parts for part in line.split(", ")} - {"none"}


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [argv for line in lines if (argv := shlex.split(line, comments=True))]


def run_command(argv: list[str]) -> None:
    """Run an ``a2gen`` command in this process, with small sizes."""
    assert argv[0] == "a2gen", f"{shlex.join(argv)}: not a command of a2gen; give a reason not to run it"
    name = next(name for name in (" ".join(argv[1:3]), argv[1]) if name in COMMANDS)
    code: Any = 0
    try:
        main([*argv[1:], *SMALL.get(name, "").split()])
    except SystemExit as error:
        code = error.code
    assert not code, f"{shlex.join(argv)}: exit code {code}"


def run_page(page: Path, known: list[list[str]], port: int = 0) -> None:
    """Run a page's blocks in order in the current directory, except for commands that are ``known`` to work."""
    namespace: dict[str, Any] = {}
    for block in read_blocks(page):
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)
        elif block.runs and block.language == "python":
            exec(compile(block.text, str(page), "exec"), namespace)
        elif block.runs and block.text.startswith("curl "):
            script = block.text.replace("localhost:8000", f"localhost:{port}")
            response = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True
            )
            assert response.stdout, f"{script}: no response"
            assert '"error"' not in response.stdout
        elif block.runs:
            for argv in commands(block):
                if argv not in known:
                    run_command(argv)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the quickstart page and an export ran."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "configs").symlink_to(REPOSITORY / "configs")
        run_page(QUICKSTART, known=[])
        run_command(shlex.split("a2gen export --run quickstart/run --out quickstart/model"))
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.runs for block in read_blocks(page))],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_documented_commands_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    setup, known = read_setup(page), []
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    if setup or page == QUICKSTART:
        folder = request.getfixturevalue("quickstart")
        if page == QUICKSTART:
            return  # the fixture ran it
        shutil.copytree(folder / "quickstart", tmp_path / "quickstart")
        known = [argv for block in read_blocks(QUICKSTART) if block.runs for argv in commands(block)]
    monkeypatch.chdir(tmp_path)
    service: Any = nullcontext()
    if "service" in setup:
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        from a2gen_rec.ranking.ranker import Ranker

        service = running(tmp_path, model=tmp_path / "quickstart" / "model", load=Ranker.load)
    with service as started:
        run_page(page, known, started.address[1] if started else 0)


def test_notebook_runs(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict[str, Any] = {}
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(cell.outputs for cell in cells if cell.cell_type == "code" and "print(" in cell.source), "execute it"
    for cell in cells:
        if cell.cell_type == "code":
            source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
            exec(compile(source, str(NOTEBOOK), "exec"), namespace)


def test_every_block_that_is_not_run_states_a_reason() -> None:
    for page in PAGES:
        for block in read_blocks(page):
            assert block.language != "console", f"{page}: use bash for commands and text for output"
            assert "<!-- not run" not in block.text
            assert block.not_run.strip() or block.runs or block.language not in ("bash", "python"), page
