"""GPUs and their links as their makers describe them, and what `hpcllm doctor` measured in place of that.

Arithmetic rates are those of dense products (no sparsity) at the boost clock. fp32 is what torch computes by default,
without TF32. Bandwidths are decimal, one direction. A link is what one GPU has to the others of its node, all ways
together; the network is one adapter of a node and how many GPUs share it.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from statistics import median

from ..errors import DataError, UsageError

GiB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """One GPU (a GCD of AMD's double chips, a core of a CPU) and its way to others.

    bf16, fp32: FLOP/s; memory: bytes; memory_bandwidth, link, adapter: bytes/s; sharing: GPUs an adapter;
    watts: of the board; products: part of the peak that matrix products reach (see `cost`: fitted for the A100, taken
    for others of its maker, assumed for the rest).
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    memory_bandwidth: float
    link: float
    adapter: float
    sharing: float
    watts: float
    source: str
    products: float = 0.74

    @property
    def network(self):
        """Bytes/s between nodes, a GPU's share."""
        return self.adapter / self.sharing

    def peak(self, precision):
        """FLOP/s of dense products at the run file's train.precision."""
        return {"bf16": self.bf16, "fp32": self.fp32}[precision]


_ALL = (
    Machine("a100", 312e12, 19.5e12, 80 * GiB, 2.039e12, 300e9, 25e9, 1, 400,
            "NVIDIA A100 data sheet (SXM, 80 GB); network as Selene: 8 HDR InfiniBand a node of 8 (arXiv 2104.04473)"),
    Machine("a100-40", 312e12, 19.5e12, 40 * GiB, 1.555e12, 300e9, 25e9, 1, 400,
            "NVIDIA A100 data sheet (SXM, 40 GB); network as Perlmutter: 4 Slingshot 11 a node of 4 (NERSC)"),
    Machine("h100", 989e12, 67e12, 80 * GiB, 3.35e12, 450e9, 50e9, 1, 700,
            "NVIDIA H100 data sheet (SXM); network of a DGX H100: 8 NDR InfiniBand a node of 8"),
    Machine("h200", 989e12, 67e12, 141 * GiB, 4.8e12, 450e9, 50e9, 1, 700,
            "NVIDIA H200 data sheet (SXM); network as of a DGX H100"),
    Machine("gh200", 989e12, 67e12, 96 * GiB, 4.0e12, 450e9, 25e9, 1, 1000,
            "NVIDIA GH200 data sheet (96 GB; watts of the whole module, CPU too); network as Alps: 4 Slingshot 11 a "
            "node of 4 (arXiv 2408.14090)"),
    Machine("v100", 15.7e12, 15.7e12, 32 * GiB, 0.9e12, 150e9, 12.5e9, 2, 300,
            "NVIDIA V100 data sheet (SXM2, 32 GB; no bf16 in its tensor cores); network of a DGX-1: 4 EDR a node"),
    Machine("mi250x", 191.5e12, 47.9e12, 64 * GiB, 1.6e12, 50e9, 25e9, 2, 280,
            "AMD MI250X data sheet, halved: one GCD; link: one Infinity Fabric link, the slowest of a ring; network as "
            "Frontier: 4 Slingshot 11 a node of 8 GCDs (OLCF)", 0.6),
    Machine("mi300x", 1307e12, 163.4e12, 192 * GiB, 5.3e12, 448e9, 50e9, 1, 750,
            "AMD MI300X data sheet; 7 Infinity Fabric links of 64 GB/s; 8 adapters of 400 Gb/s a node of 8", 0.5),
    Machine("cpu", 200e9, 90e9, 4 * GiB, 15e9, 5e9, 25e9, 64, 4.5,
            "a Zen 4 core as measured (products, memory); 4 GiB, 1/64 of 280 W and of 200 Gb/s: assumed", 0.9),
)  # fmt: skip
MACHINES = {machine.name: machine for machine in _ALL}


def find(name):
    """The Machine called `name`. Raises UsageError that lists those that are known."""
    if name not in MACHINES:
        near = difflib.get_close_matches(name, MACHINES, n=1)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        raise UsageError(f'plan: --gpu "{name}" is not known{hint}; known: {", ".join(MACHINES)}')
    return MACHINES[name]


def called(name):
    """The Machine that torch calls `name` ("NVIDIA A100-SXM4-80GB", "AMD Instinct MI250X"), or None."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    if {"pcie", "nvl", "mig"} & set(words):
        return None  # boards with other clocks than the modules of the data sheets above, and parts of a GPU
    if "a100" in words and "40gb" in words:
        return MACHINES["a100-40"]
    return next((found for key, found in MACHINES.items() if key in words), None)


def measured(machine, told):
    """`machine` with what `hpcllm doctor --json` (its dict `told`) found in place of data sheets. Raises DataError.

    Products: the median over ranks of large products, which are then all of what products reach. Network: the median
    over pairs of hosts, one process a host, which is one adapter. Links between ranks of one host were measured in host
    memory, so they count for "cpu" alone.
    """
    try:
        facts = told["facts"]
        rates = {kind: median(rank["flops"][kind] for rank in facts["ranks"]) for kind in ("bf16", "fp32")}
        links = [link["bandwidth_bytes_per_s"] for link in facts["links"] or ()]
        between_hosts = facts["between"] == "host"
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"plan: --measured: this is not what `hpcllm doctor --json` prints: no {error}") from None
    changes = {}
    if all((rank["gpu"] is None) == (machine.name == "cpu") for rank in facts["ranks"]):
        changes = {kind: rate / machine.products for kind, rate in rates.items()}
    if links and between_hosts:
        changes["adapter"] = median(links)
    elif links and machine.name == "cpu":
        changes["link"] = median(links)
    return dataclasses.replace(machine, **changes)
