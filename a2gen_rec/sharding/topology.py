"""Hardware that a plan is made for: read from a file, or detected in this process."""

import math
import os
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import PurePath

import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

from a2gen_rec.config import ShardingConfig
from a2gen_rec.config.sharding import MAX_DDR_GB, MAX_HBM_GB
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils import paths

GB = 10**9
MAX_RANKS = 16_384
_LIMITS = {
    "ranks": (MAX_RANKS, "ranks"),
    "hbm_gb": (MAX_HBM_GB, "GB (10^9 bytes) per rank"),
    "ddr_gb": (MAX_DDR_GB, "GB (10^9 bytes) per rank"),
    "hbm_gbps": (100_000, "GB/s per rank"),
    **dict.fromkeys(("ddr_gbps", "intra_host_gbps", "inter_host_gbps", "hbm_to_ddr_gbps"), (10_000, "GB/s per rank")),
}
"""Limits that reject other units."""

# The ratios between bandwidths decide a plan, and they differ little between machines of one kind. Processes without
# stated bandwidths use those of configs/topologies/h100_1x8.yaml and laptop.yaml.
_BANDWIDTHS = {
    "cuda": {
        "hbm_gbps": 3350.0,
        "ddr_gbps": 76.8,
        "hbm_to_ddr_gbps": 64.0,
        "intra_host_gbps": 450.0,
        "inter_host_gbps": 50.0,
    },
    "cpu": {"ddr_gbps": 44.8, "intra_host_gbps": 22.4, "inter_host_gbps": 1.25},
}


@dataclass(frozen=True)
class Cluster:
    """Equal hosts with equal ranks.

    Attributes:
        name: Name of the cluster.
        device: ``cuda``: tables in device memory (HBM), or ``cpu``: tables in host memory (DDR).
        ranks: Number of ranks.
        ranks_per_host: Ranks on each host.
        ddr_gb: Host memory per rank, in GB (10^9 bytes).
        ddr_gbps: Bandwidth of host memory per rank, in GB/s.
        intra_host_gbps: Bandwidth of a rank to ranks on its host, one way, in GB/s.
        inter_host_gbps: Bandwidth of a rank to ranks on other hosts, one way, in GB/s.
        hbm_gb: Device memory per rank, in GB (10^9 bytes).
        hbm_gbps: Bandwidth of device memory per rank, in GB/s.
        hbm_to_ddr_gbps: Bandwidth of a device to host memory, one way, in GB/s.

    Raises:
        ConfigError: A value is out of range, or the ranks do not fill the hosts.
    """

    name: str
    device: str
    ranks: int
    ranks_per_host: int
    ddr_gb: float
    ddr_gbps: float
    intra_host_gbps: float
    inter_host_gbps: float
    hbm_gb: float = 0.0
    hbm_gbps: float = 0.0
    hbm_to_ddr_gbps: float = 0.0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"{self.name}: field 'device': {self.device!r} must be 'cpu' or 'cuda'")
        for field in fields(self):
            value = getattr(self, field.name)
            checked = field.type in (int, float) and (field.default is MISSING or self.device == "cuda")
            if checked and not 0 < value < math.inf:
                raise ConfigError(f"{self.name}: field {field.name!r}: {value} must be positive and finite")
            if (limit := _LIMITS.get(field.name)) is not None and value > limit[0]:
                raise ConfigError(
                    f"{self.name}: field {field.name!r}: {value} must be at most {limit[0]:,.0f} {limit[1]}"
                )
        if self.ranks > self.ranks_per_host and self.ranks % self.ranks_per_host:
            raise ConfigError(f"{self.name}: {self.ranks} ranks do not fill hosts of {self.ranks_per_host}")

    @property
    def local_ranks(self) -> int:
        """Ranks on each host; fewer than ``ranks_per_host`` if the only host is not full."""
        return min(self.ranks, self.ranks_per_host)

    def with_ranks(self, ranks: int) -> "Cluster":
        """Return a cluster of the same hosts with another number of ranks."""
        return replace(self, ranks=ranks)

    def with_memory(self, config: ShardingConfig) -> "Cluster":
        """Return the cluster with the memory per rank of the config; 0 keeps the cluster's."""
        return replace(self, hbm_gb=config.hbm_gb or self.hbm_gb, ddr_gb=config.ddr_gb or self.ddr_gb)

    def topology(self, reservation: float) -> Topology:
        """Return TorchRec's topology with memory minus the reservation. TorchRec's reservations do not apply to DDR."""
        cuda, free, per_ms = self.device == "cuda", (1 - reservation) * GB, GB / 1000
        hardware = HardwareConfig(
            hbm_cap_bytes=int(self.hbm_gb * free) if cuda else None,
            ddr_cap_bytes=int(self.ddr_gb * free),
            intra_host_bw=self.intra_host_gbps * per_ms,
            inter_host_bw=self.inter_host_gbps * per_ms,
            hbm_mem_bw=self.hbm_gbps * per_ms if cuda else None,
            ddr_mem_bw=self.ddr_gbps * per_ms,
            hbm_to_ddr_mem_bw=self.hbm_to_ddr_gbps * per_ms if cuda else None,
        )
        return TopologyFactory.create_topology(
            TrainerConfig(world_size=self.ranks, local_world_size=self.local_ranks),
            hardware,
            # Without this flag, TorchRec plans with the bandwidths of its default hardware.
            KernelConfig(compute_device=self.device, use_hardware_based_bandwidth=True),
        )

    @classmethod
    def from_yaml(cls, file: str) -> "Cluster":
        """Read a YAML file of the fields above; the name of the file is the cluster's name.

        Raises:
            ConfigError: A field is missing, unknown, of the wrong type or out of range.
            UserError: The file cannot be read.
        """
        return cls.from_dict(paths.read_yaml(file), file)

    @classmethod
    def from_dict(cls, raw: object, file: str) -> "Cluster":
        """Return the cluster in ``raw``, the plain data of ``file``; see :meth:`from_yaml`."""
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: not a topology; expected a mapping of fields such as 'device' and 'ranks'")
        known = {field.name: field for field in fields(cls) if field.name != "name"}
        raw = dict(raw)
        for name in raw:
            if name not in known:
                raise ConfigError(f"{file}: unknown field {name!r}; choose one of {', '.join(known)}")
        for name, field in known.items():
            if name not in raw:
                if field.default is MISSING or raw.get("device") == "cuda":
                    raise ConfigError(f"{file}: field {name!r} is missing")
                continue
            value, types = raw[name], (int, float) if field.type is float else field.type
            if field.type is float and isinstance(value, str):  # YAML 1.1 reads 3.35e3 as text
                with suppress(ValueError):
                    value = raw[name] = float(value)
            if not isinstance(value, types) or isinstance(value, bool):  # type: ignore[arg-type]
                kind = {str: "a string", int: "an integer", float: "a number"}[field.type]  # type: ignore[index]
                raise ConfigError(f"{file}: field {name!r}: {value!r} must be {kind}")
        try:
            return cls(name=PurePath(file).stem, **raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {str(error).partition(': ')[2]}") from error

    @classmethod
    def from_local_process(
        cls, device: torch.device, ranks: int, ranks_per_host: int, config: ShardingConfig
    ) -> "Cluster":
        """Return the hardware of this process; memory is that of the device and the host unless configured."""
        host_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
        hbm_gb = torch.cuda.get_device_properties(device).total_memory / GB if device.type == "cuda" else 0.0
        cluster = cls(
            name="this machine",
            device=device.type,
            ranks=ranks,
            ranks_per_host=ranks_per_host,
            hbm_gb=hbm_gb,
            ddr_gb=host_gb / ranks_per_host,
            **_BANDWIDTHS[device.type],
        )
        return cluster.with_memory(config)
