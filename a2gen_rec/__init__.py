"""Short-video ranking from action sequences: A2Gen on TorchRec-sharded embedding tables.

The names in ``__all__`` are imported on first use, so that ``import a2gen_rec`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2gen_rec.config import Config
    from a2gen_rec.data.card import DatasetCard
    from a2gen_rec.data.prepare.pipeline import prepare
    from a2gen_rec.errors import ConfigError, DataError, UserError
    from a2gen_rec.ranking.ranker import Ranker
    from a2gen_rec.ranking.types import Impression, RankedList, RankQuery

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "DatasetCard",
    "Impression",
    "RankQuery",
    "RankedList",
    "Ranker",
    "UserError",
    "prepare",
]

_MODULES = {
    "Config": "a2gen_rec.config",
    "ConfigError": "a2gen_rec.errors",
    "DataError": "a2gen_rec.errors",
    "DatasetCard": "a2gen_rec.data.card",
    "Impression": "a2gen_rec.ranking.types",
    "RankQuery": "a2gen_rec.ranking.types",
    "RankedList": "a2gen_rec.ranking.types",
    "Ranker": "a2gen_rec.ranking.ranker",
    "UserError": "a2gen_rec.errors",
    "prepare": "a2gen_rec.data.prepare.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
