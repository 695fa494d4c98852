"""What training left, as one text: the digests of the last step's tensors and states."""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1], "tiny")
last = max(run.glob("step_*"))
for name, record in sorted(json.loads((last / "manifest.json").read_text())["files"].items()):
    if name.endswith(".distcp") or name.startswith("trainer/"):
        print(last.name, name, record["digest"])
