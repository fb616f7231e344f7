"""`python -m edge.bench JOB`: one round of edge in a process of its own, for `rounds.measure`."""

from __future__ import annotations

import json
import sys

from edge.bench.rounds import run_ours

if __name__ == "__main__":
    print(json.dumps(run_ours(json.loads(sys.argv[1]))))
