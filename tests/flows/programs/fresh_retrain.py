"""Run a retrain, whose parameters come as JSON on standard input, and tell which heavy modules this process loaded."""

import json
import sys

from flows.retrain import retrain

HEAVY = ("torch", "transformers", "safetensors", "datasets", "tokenizers")

before = [name for name in HEAVY if name in sys.modules]
result = retrain(**json.load(sys.stdin))
after = [name for name in HEAVY if name in sys.modules]
print("\n" + json.dumps({"before": before, "after": after, "result": result}))
