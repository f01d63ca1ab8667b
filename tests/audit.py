"""`make audit`: known vulnerabilities of the versions in constraints.txt, as pip-audit finds them. Not a test.

pip-audit ends well, and says that it found nothing, also where the service knows none of the versions that it was
asked about. Here only what was looked up counts.
"""

import json
import subprocess
import sys


def judge(dependencies):
    """(exit code, sentence) of pip-audit's list: each has "name" and either "skip_reason" or "version" and "vulns"."""
    unknown = [one["name"] for one in dependencies if "skip_reason" in one]
    wrong = {f"{one['name']} {one['version']}": one["vulns"] for one in dependencies if one.get("vulns")}
    looked_up = len(dependencies) - len(unknown)
    if wrong:
        listed = "; ".join(f"{name}: {', '.join(found['id'] for found in some)}" for name, some in wrong.items())
        return 1, f"vulnerabilities known: {listed}"
    if not looked_up:
        return 0, f"skipped: the service of vulnerabilities answered for none of {len(dependencies)} packages"
    if unknown:
        return 1, f"none known of {looked_up} packages, but {len(unknown)} were not looked up: {', '.join(unknown)}"
    return 0, f"no vulnerabilities known of {looked_up} packages"


def main():
    command = [*sys.argv[1:], "--disable-pip", "--no-deps", "--format", "json", "--requirement", "constraints.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"audit: skipped: the service of vulnerabilities cannot be reached from here ({said})")
        return
    code, sentence = judge(dependencies)
    print(f"audit: {sentence}")
    sys.exit(code)


if __name__ == "__main__":
    main()
