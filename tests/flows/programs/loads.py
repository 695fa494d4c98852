"""Load models by name from the Hub that HF_ENDPOINT names, as users do.

Each line of standard input is a JSON list, the repository and a revision or null; the answer is a line of JSON too: the
sha256 of each parameter's bytes, by its name.
"""

import hashlib
import json
import sys

from transformers import AutoModelForCausalLM

for line in sys.stdin:
    repository, revision = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(repository, revision=revision or "main")
    digests = {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }
    print(json.dumps(digests), flush=True)
