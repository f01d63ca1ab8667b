"""Run scripts as `python SCRIPT` would, one after another, and say how their tensors travelled. Not a test.

    python tests/run_example.py FOLDER SCRIPT...

Each script gets one argument, the folder FOLDER/<name of the script>, and every process prints one line of JSON at
the end: rank, size, the backend of the default process group and the seconds spent in calls of hpcllm's backend.
"""

import json
import runpy
import sys
from pathlib import Path

folder, *scripts = sys.argv[1:]
for script in scripts:
    sys.argv = [script, str(Path(folder) / Path(script).stem)]
    runpy.run_path(script, run_name="__main__")

import torch.distributed as dist  # noqa: E402 (the scripts come first, as they would without this file)

work = sys.modules.get("hpcllm.mpi.work")
here = {
    "rank": dist.get_rank(),
    "size": dist.get_world_size(),
    "backend": dist.get_backend(),
    "communication_s": work.communication_s() if work else 0.0,
}
sys.stdout.write(json.dumps(here) + "\n")
sys.stdout.flush()
