"""Generated pages: the committed ones are current, and links from the README lead to files."""

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import yaml

from a2gen_rec.artifact import manifest
from a2gen_rec.data import schema
from a2gen_rec.serving.stores import sqlite
from tests.helpers import REPOSITORY


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", REPOSITORY / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse formats help differently in each version")
def test_committed_pages_are_current(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    pages = generator.generate(REPOSITORY)
    assert len(pages) >= 6
    stale = []
    for name, content in pages.items():
        text = content if isinstance(content, bytes) else content.encode()
        if not (REPOSITORY / name).exists() or (REPOSITORY / name).read_bytes() != text:
            stale.append(name)
    assert not stale, "out of date; run `make docs`"


def test_every_setting_has_a_text(generator: ModuleType) -> None:
    page = generator.config_page()
    missing = re.findall(r"^\| `(\w+)` \|.*\|  \|$", page, re.MULTILINE)
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (REPOSITORY / name).read_text())
    missing = [link for link in links if not link.startswith("../../actions") and not (REPOSITORY / link).exists()]
    assert not missing


def test_repository_files_are_valid_yaml() -> None:
    files = [
        *(REPOSITORY / ".github").rglob("*.yml"),
        REPOSITORY / "CITATION.cff",
        REPOSITORY / ".pre-commit-config.yaml",
    ]
    assert len(files) > 6
    assert all(yaml.safe_load(file.read_text()) for file in files)


def test_failure_codes_of_the_service_are_documented() -> None:
    page = (REPOSITORY / "docs" / "how-to" / "operate-the-service.md").read_text()
    table = page[page.index("## Failures") :]
    http = REPOSITORY / "a2gen_rec" / "serving" / "http"
    source = "".join(file.read_text() for file in http.glob("*.py"))
    codes = set(re.findall(r'ApiError\(\s*\d+, "(\w+)"', source)) | set(
        re.findall(r'service_unavailable\(\s*"(\w+)"', source)
    )
    assert len(codes) > 10
    assert not {code for code in codes if f"`{code}`" not in table}


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("dataset-format.md", f"`format_version` is {schema.FORMAT_VERSION};"),
        ("export-format.md", f"`format` is {manifest.FORMAT_VERSION};"),
        ("event-store.md", f"schema version {sqlite.SCHEMA_VERSION} (`user_version`)"),
    ],
)
def test_pages_have_the_current_format_versions(page: str, text: str) -> None:
    assert text in " ".join((REPOSITORY / "docs" / "reference" / page).read_text().split())


def test_page_of_findings_lists_all_scripts():
    folder = REPOSITORY / "findings"
    listed = re.findall(r"\]\(([\w.-]+\.sh)\)", (folder / "README.md").read_text())
    assert sorted(listed) == sorted(file.name for file in folder.glob("*.sh"))
