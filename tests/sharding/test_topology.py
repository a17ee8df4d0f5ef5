"""Topology files: shipped ones, invalid ones, and the topology passed to TorchRec's planner."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from a2gen_rec.config import ShardingConfig
from a2gen_rec.errors import ConfigError
from a2gen_rec.sharding.topology import Cluster
from tests.helpers import CONFIGS

FOLDER = CONFIGS / "topologies"
SHIPPED = sorted(FOLDER.glob("*.yaml"))
GOOD = {
    "device": "cuda",
    "ranks": 16,
    "ranks_per_host": 8,
    "hbm_gb": 80,
    "ddr_gb": 100.0,
    "hbm_gbps": 3000,
    "ddr_gbps": 70,
    "intra_host_gbps": 400,
    "inter_host_gbps": 40,
    "hbm_to_ddr_gbps": 60,
}


def write_topology(folder: Path, **fields: object) -> str:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in (GOOD | fields).items() if value != "absent"}))
    return str(file)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_clusters_match_their_names(file: Path) -> None:
    cluster = Cluster.from_yaml(str(file))
    assert cluster.name == file.stem
    kind, _, shape = file.stem.partition("_")
    if shape:
        hosts, ranks = map(int, shape.split("x"))
        assert (cluster.ranks, cluster.ranks_per_host) == (hosts * ranks, ranks)
    assert cluster.device == ("cuda" if kind.startswith("h") else "cpu")
    assert cluster.topology(0.2).world_size == cluster.ranks


def test_planner_receives_bytes_and_bytes_per_ms(tmp_path: Path) -> None:
    topology = Cluster.from_yaml(write_topology(tmp_path)).topology(reservation=0.25)
    assert (topology.world_size, topology.local_world_size) == (16, 8)
    assert {(device.storage.hbm, device.storage.ddr) for device in topology.devices} == {(60 * 10**9, 75 * 10**9)}
    bandwidths = [topology.hbm_mem_bw, topology.ddr_mem_bw, topology.hbm_to_ddr_mem_bw]
    bandwidths += [topology.intra_host_bw, topology.inter_host_bw]
    assert bandwidths == [value * 10**6 for value in (3000, 70, 60, 400, 40)]


def test_reservation_applies_to_host_memory() -> None:
    topology = Cluster.from_yaml(str(FOLDER / "cpu_16x2.yaml")).topology(reservation=0.5)
    assert {(device.storage.hbm, device.storage.ddr) for device in topology.devices} == {(0, 256 * 10**9)}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hosts": 3}, "unknown field 'hosts'; choose one of device, ranks,"),
        ({"ddr_gb": "absent"}, "field 'ddr_gb' is missing"),
        ({"hbm_gb": "absent"}, "field 'hbm_gb' is missing"),
        ({"hbm_gb": 85899345920}, "field 'hbm_gb': 85899345920 must be at most 2,000 GB (10^9 bytes) per rank"),
        ({"hbm_gb": 81920}, "must be at most 2,000 GB (10^9 bytes) per rank"),
        ({"ddr_gb": 262144}, "must be at most 20,000 GB (10^9 bytes) per rank"),
        ({"hbm_gbps": 3.35e12}, "must be at most 100,000 GB/s per rank"),
        ({"inter_host_gbps": 50_000}, "must be at most 10,000 GB/s per rank"),
        ({"ranks": 10**6, "ranks_per_host": 8}, "must be at most 16,384 ranks"),
        ({"hbm_gbps": "nan"}, "must be positive and finite"),
        ({"ranks": 8.5}, "field 'ranks': 8.5 must be an integer"),
        ({"ranks": True}, "field 'ranks': True must be an integer"),
        ({"ranks": 0}, "field 'ranks': 0 must be positive"),
        ({"hbm_gbps": "fast"}, "field 'hbm_gbps': 'fast' must be a number"),
        ({"ddr_gb": math.inf}, "field 'ddr_gb': inf must be positive and finite"),
        ({"inter_host_gbps": -1}, "field 'inter_host_gbps': -1 must be positive"),
        ({"device": "tpu"}, "field 'device': 'tpu' must be 'cpu' or 'cuda'"),
        ({"device": 3}, "field 'device': 3 must be a string"),
        ({"ranks": 12}, "12 ranks do not fill hosts of 8"),
    ],
)
def test_rejects_invalid_fields(fields: dict, reason: str, tmp_path: Path) -> None:
    file = write_topology(tmp_path, **fields)
    with pytest.raises(ConfigError) as caught:
        Cluster.from_yaml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["just words", "- 1\n- 2", "a: [", ""])
def test_rejects_other_files(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"cluster\.yaml: (not a topology|invalid YAML)") as caught:
        Cluster.from_yaml(str(file))
    assert "\n" not in str(caught.value)


def test_detects_local_hardware_and_applies_config() -> None:
    cluster = Cluster.from_local_process(torch.device("cpu"), 4, 2, ShardingConfig())
    assert (cluster.ranks, cluster.local_ranks, cluster.device) == (4, 2, "cpu")
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert cluster.ddr_gb == pytest.approx(total * 1024 / 10**9 / 2, rel=0.02)
    assert Cluster.from_local_process(torch.device("cpu"), 4, 2, ShardingConfig(ddr_gb=3.0)).ddr_gb == 3.0


def test_fewer_ranks_than_a_host() -> None:
    cluster = Cluster.from_yaml(str(FOLDER / "h100_1x8.yaml")).with_ranks(4)
    assert (cluster.ranks, cluster.local_ranks) == (4, 4)


def test_reads_numbers_with_an_exponent(tmp_path: Path) -> None:
    file = write_topology(tmp_path)
    Path(file).write_text(Path(file).read_text().replace("hbm_gbps: 3000", "hbm_gbps: 3.35e3"))
    assert Cluster.from_yaml(file).hbm_gbps == 3350.0
