"""The commands of docs/qlora.md that need no large model, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.models import fourbit

PAGE = Path(__file__).resolve().parents[3] / "docs" / "qlora.md"


@pytest.mark.skipif(not fourbit.installed(), reason="bitsandbytes is not installed (extra qlora)")
def test_the_page_s_command(run: Callable[..., Any], home: Path) -> None:
    (words,) = (line for line in re.findall(r"^    alignlab (.*)$", PAGE.read_text(), re.M) if "model=tiny" in line)
    answer = run(*shlex.split(words))
    assert answer.code == 0, answer.err
    # What `tiny` holds in 4 bits counts as the weights that it stands for.
    assert "parameters, 0." in answer.out
    folder = home / "runs" / "packed"
    losses = json.loads((folder / "result.json").read_text())
    assert losses["after"]["eval_loss"] < losses["before"]["eval_loss"]
    weights = load_file(folder / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((folder / "model" / "config.json").read_text())
    assert all(".lora_" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert run("evaluate", "runs/packed", "eval.limit=4").code == 0
