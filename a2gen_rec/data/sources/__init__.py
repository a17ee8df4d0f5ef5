"""Raw logs that ``prepare`` reads: one module per public log, the simulator's, and one for your own."""

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
    """The source ``name`` at the local file or folder ``raw``; ``spec`` describes a generic log's columns.

    Raises:
        ConfigError: no such source, or a spec missing or given in vain.
        DataError: the raw files are not there.
    """
    if name not in SOURCE_NAMES:
        raise ConfigError(f"no source {name!r}; there are {', '.join(SOURCE_NAMES)}")
    if name == "generic":
        if spec is None:
            raise ConfigError("the generic source needs --spec, a YAML file that describes the log's columns")
        return open_generic(raw, spec)
    if spec is not None:
        raise ConfigError(f"--spec describes a generic log; the source {name!r} knows its own columns")
    if name == "simulated":
        from a2gen_rec.data.sources.simulated import Simulated

        return Simulated(raw)
    known: dict[str, Callable[[str], Source]] = {
        "kuairand": KuaiRand,
        "jd": JD,
        "rec_tmall": RecTmall,
        "tenrec": Tenrec,
    }
    return known[name](raw)
