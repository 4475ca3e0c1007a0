"""``alignlab sample RUN_OR_MODEL``: batched answers to prompts, one JSON object a line."""

from __future__ import annotations

import json

from alignlab.measuring.sampling import asked, sampled
from alignlab.measuring.verification import as_json
from alignlab.request import Request, emit
from alignlab.verbs.evaluate import trained


def run(request: Request) -> int:
    """Answer ``eval.prompt`` or the prompts of the rows (held-out ones where the configuration has some)."""
    config, _ = trained(request)
    found = []
    for answer in sampled(config, asked(config, "sample"), "sample"):
        found.append(answer)
        if request.json is not True:
            print(json.dumps(as_json([answer])[0], ensure_ascii=False), flush=True)
    emit(request, {"model": config.model.name_or_path, "answers": as_json(found)})
    return 0
