"""Sources of raw logs for ``prepare``: public logs, simulated logs, and generic logs described by a YAML spec.

May import ``data.schema``, ``data.sql``, ``simulation``, ``config``, ``utils`` and ``errors``.
"""

from collections.abc import Callable

from a2gen_rec.config.data import SOURCE_NAMES
from a2gen_rec.data.sources.base import Source
from a2gen_rec.data.sources.generic import open_generic
from a2gen_rec.data.sources.jd import JD
from a2gen_rec.data.sources.kuairand import KuaiRand
from a2gen_rec.data.sources.rec_tmall import RecTmall
from a2gen_rec.data.sources.tenrec import Tenrec
from a2gen_rec.errors import ConfigError


def open_source(name: str, raw: str, spec: str | None = None) -> Source:
    """Open the source ``name`` at the local file or directory ``raw``; ``spec`` describes a generic log's columns.

    Raises:
        ConfigError: unknown source, or a missing or superfluous spec.
        DataError: the raw files are missing.
    """
    if name not in SOURCE_NAMES:
        raise ConfigError(f"unknown source {name!r}; choose one of {', '.join(SOURCE_NAMES)}")
    if name == "generic":
        if spec is None:
            raise ConfigError("the source 'generic' requires --spec, a YAML file that describes the log's columns")
        return open_generic(raw, spec)
    if spec is not None:
        raise ConfigError(f"--spec applies to the source 'generic' only, not to {name!r}")
    if name == "simulated":
        from a2gen_rec.data.sources.simulated import Simulated

        return Simulated(raw)
    sources: dict[str, Callable[[str], Source]] = {
        "kuairand": KuaiRand,
        "jd": JD,
        "rec_tmall": RecTmall,
        "tenrec": Tenrec,
    }
    return sources[name](raw)
