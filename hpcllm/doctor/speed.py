"""How fast each rank computes and each link carries, and which host stands out. Compares; knows no machine's numbers.

Products are measured by `utilisation`, links and clocks by `mpi.links`; nothing here needs MPI.
"""

from statistics import median

from .cores import by_host
from .finding import duration, failure, named, ok, on, size, warning

# A rank is slow below this part of the median of all, a host's links below half of it: topology alone makes a third.
SLOW_PART, SLOW_LINK_PART = 0.75, 0.5
SLOW_BF16_PART = 0.5
# Between hosts; a fabric has 1 to 3 us and 10 GB/s and more, TCP over Ethernet at best 15 us.
SLOW_LINK_S, SLOW_LINK_BYTES_PER_S = 100e-6, 1e9
CLOCKS_WARN_S, CLOCKS_FAIL_S = 0.1, 5.0


# --- judging -----------------------------------------------------------------------------------------------------


def judge_products(ranks, crowded):
    """Findings about matrix products. ranks: facts with "flops"; crowded: ranks that share a core with another one."""
    kinds = list(ranks[0]["flops"])
    usual = {kind: median(rank["flops"][kind] for rank in ranks) for kind in kinds}
    told = ", ".join(f"{kind} {_flops(usual[kind])}" for kind in kinds)
    findings = []
    if usual["bf16"] < SLOW_BF16_PART * usual["fp32"]:
        text = (
            f"bf16 matrix products are {usual['fp32'] / usual['bf16']:.0f} times slower than fp32 here: {told} a rank"
        )
        findings.append(warning("speed", text, 'train.precision = "fp32" on this kind of node'))
    alone = [rank for rank in ranks if rank["rank"] not in crowded]
    if len(alone) < 2:
        why = "one rank" if len(ranks) == 1 else "ranks that take turns on a core"
        return [*findings, ok("speed", f"matrix products of {why}, which cannot be compared: {told} (median)")]
    for kind in kinds:
        usual_here = median(rank["flops"][kind] for rank in alone)
        slow = [rank for rank in alone if rank["flops"][kind] < SLOW_PART * usual_here]
        for host, group in by_host(slow).items():
            slowest = min(rank["flops"][kind] for rank in group)
            text = (
                f"{host} is slow: {kind} matrix products of {named('rank', [rank['rank'] for rank in group])} at "
                f"{_flops(slowest)}, {slowest / usual_here:.0%} of the median {_flops(usual_here)}"
            )
            cure = "look for other processes and throttling there, or leave it out (--exclude-file)"
            findings.append(failure("speed", text, cure, [host]))
    return findings or [ok("speed", f"matrix products of all ranks are alike: {told} a rank (median)")]


def _flops(rate):
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def judge_links(names, links, between_hosts):
    """Findings about the links of `mpi.links.measure` between the places called `names`."""
    if not links:
        return []
    total = len(names) * (len(names) - 1) // 2
    latency = median(link["latency_s"] for link in links)
    rates = [link["bandwidth_bytes_per_s"] for link in links]
    usual = median(rates)
    text = f"{len(links)} of {total} pairs of {'hosts' if between_hosts else 'ranks'}: latency {duration(latency)}, "
    text += f"bandwidth {size(usual)}/s (medians; {size(min(rates))}/s to {size(max(rates))}/s)"
    if not between_hosts:
        return [ok("links", text)]
    findings = []
    if latency > SLOW_LINK_S or usual < SLOW_LINK_BYTES_PER_S:
        cure = "use the MPI that the site built for its fabric, and its fabric variables (slurm/site.sh)"
        findings.append(warning("links", f"{text}: slow, so MPI is not on a fast network", cure))
    ends = {place: [] for place in range(len(names))}
    for link in links:
        ends[link["a"]].append(link["bandwidth_bytes_per_s"])
        ends[link["b"]].append(link["bandwidth_bytes_per_s"])
    slow = set()
    # With two hosts nothing tells which end of the only link is slow.
    for place, found in ends.items() if len(names) > 2 else ():
        if found and median(found) < SLOW_LINK_PART * usual:
            slow.add(place)
            text = f"links of {names[place]} are slow: {size(median(found))}/s, the median of all is {size(usual)}/s"
            cure = "leave it out (--exclude-file) and tell the site"
            findings.append(failure("links", text, cure, [names[place]]))
    poor = [
        link
        for link in links
        if link["bandwidth_bytes_per_s"] < SLOW_LINK_PART * usual and not slow & {link["a"], link["b"]}
    ]
    if poor:
        worst = min(poor, key=lambda link: link["bandwidth_bytes_per_s"])
        text = (
            f"{len(poor)} of {total} links are slow, worst {names[worst['a']]} to {names[worst['b']]} at "
            f"{size(worst['bandwidth_bytes_per_s'])}/s, the median is {size(usual)}/s"
        )
        cure = "ask for neighbouring nodes (`--switches=1`), or tell the site"
        findings.append(warning("links", text, cure))
    return findings or [ok("links", text)]


def judge_clocks(names, offsets):
    """Findings about `mpi.links.clock_offsets` of the hosts called `names`; the middle one is believed."""
    if len(names) < 2:
        return []
    middle = offsets.index(sorted(offsets)[(len(offsets) - 1) // 2])
    ahead_s = [offset_s - offsets[middle][0] for offset_s, _ in offsets]
    error_s = [error_s + offsets[middle][1] for _, error_s in offsets]
    sure_s = [abs(ahead) - error for ahead, error in zip(ahead_s, error_s, strict=True)]
    worst = max(range(len(names)), key=sure_s.__getitem__)
    for limit, level in ((CLOCKS_FAIL_S, failure), (CLOCKS_WARN_S, warning)):
        off = [name for name, seconds in zip(names, sure_s, strict=True) if seconds > limit]
        if off:
            text = f"clocks differ {on(off)}: {names[worst]} is {duration(abs(ahead_s[worst]))} "
            text += f"{'ahead of' if ahead_s[worst] > 0 else 'behind'} {names[middle]}"
            cure = "tell the site that time synchronisation (chrony, ntpd) is broken there"
            return [level("clocks", text, cure, off if len(names) > 2 else ())]  # of two, nobody knows which is wrong
    most = max(abs(ahead) + error for ahead, error in zip(ahead_s, error_s, strict=True))
    return [ok("clocks", f"clocks of {len(names)} hosts agree within {duration(most)}")]
