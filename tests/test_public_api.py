"""Public names of the package, and imports that need no torch."""

import subprocess
import sys

import pytest

import a2gen_rec

pytestmark = pytest.mark.processes


def loaded_modules(code: str) -> set[str]:
    """Return the modules that a new interpreter has loaded after ``code``."""
    script = f"{code}\nimport sys\nprint('\\nmodules', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_public_names_are_importable() -> None:
    assert len(a2gen_rec.__all__) == 10
    for name in a2gen_rec.__all__:
        assert getattr(a2gen_rec, name).__name__ == name
    assert set(a2gen_rec.__all__) <= set(dir(a2gen_rec))


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'a2gen_rec' has no attribute 'nothing'"):
        a2gen_rec.nothing  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import a2gen_rec",
        "from a2gen_rec import Config, ConfigError, DataError, UserError",
        "from a2gen_rec.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from a2gen_rec.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_imports_no_torch(code: str) -> None:
    modules = loaded_modules(code)
    assert "a2gen_rec" in modules
    assert not {"torch", "torchrec", "duckdb", "pyarrow"} & modules
