"""What the doctor says: findings, and how ranks, hosts and amounts are written in them. Decides nothing."""

from dataclasses import dataclass

OK, WARNING, FAILURE = "ok", "warning", "failure"
_NAMED = 8  # so many hosts are named in a sentence


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    level: "ok", "warning" (works, but worse than it could) or "failure" (a job here would fail or crawl).
    subject: a word to grep for. sentence: what was found, with numbers. cure: what to do about it, "" for ok.
    hosts: those that a job had better avoid; none where it is the job that is wrong, or all hosts alike.
    """

    level: str
    subject: str
    sentence: str
    cure: str = ""
    hosts: tuple[str, ...] = ()

    def line(self):
        level = self.level.upper() if self.level == FAILURE else self.level
        return f"{level:8} {self.subject:10} {self.sentence}{f'; cure: {self.cure}' if self.cure else ''}"


def ok(subject, sentence):
    return Finding(OK, subject, sentence)


def warning(subject, sentence, cure, hosts=()):
    return Finding(WARNING, subject, sentence, cure, tuple(hosts))


def failure(subject, sentence, cure, hosts=()):
    return Finding(FAILURE, subject, sentence, cure, tuple(hosts))


def excluded(findings):
    """Hosts of all failures as sbatch's --exclude takes them: comma separated on one line, "" for none."""
    hosts = {host: None for finding in findings if finding.level == FAILURE for host in finding.hosts}
    return ",".join(hosts)


def odd_ones(names, hosts):
    """`names`, or none where they are all of `hosts`: a job on other hosts like these would be no better off."""
    return () if set(names) == set(hosts) else tuple(dict.fromkeys(names))


def numbers(values):
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def named(word, values):
    """("rank", [0, 1, 2]) as "ranks 0-2", ("core", [3]) as "core 3"."""
    return f"{word}{'s' if len(values) > 1 else ''} {numbers(values)}"


def on(hosts):
    """ "on n1, n2", "on n1, n2, ... (100 hosts)"."""
    hosts = list(dict.fromkeys(hosts))
    shown = ", ".join(hosts[:_NAMED])
    return f"on {shown}" if len(hosts) <= _NAMED else f"on {shown}, ... ({len(hosts)} hosts)"


def size(amount):
    """Bytes for a human: 3.4 GB (10^9)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(amount) < 1000 or unit == "TB":
            return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000


def duration(seconds):
    """Seconds for a human, from microseconds on."""
    for unit, length in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= length or unit == "us":
            return f"{seconds / length:.3g} {unit}"
