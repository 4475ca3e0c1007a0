"""An objective, a row format and a verifier from one file outside the checkout, trained from outside the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from alignlab import testing
from alignlab.plugins import load
from alignlab.registry import OBJECTIVES

MINE = '''
from __future__ import annotations

from dataclasses import dataclass

from alignlab.objectives.base import BaseObjective, mean_stat
from alignlab.registry import register_format, register_objective, register_verifier
from alignlab.types import Ask, LossOutput, Message, Sample, SequenceSample, Unit


@dataclass
class SquaredConfig:
    """Keys of the objective ``squared``."""

    name: str = "squared"
    target: float = 1.5
    """log-probability (negated) that every token is pulled to"""


@register_objective
class Squared(BaseObjective):
    name = "squared"
    units = (Unit.TOKEN,)
    example = Unit.SEQUENCE
    Config = SquaredConfig

    def __call__(self, score, batch, context):
        logps = score(batch, Ask("logps")).logps[batch.seq_idx]
        weight = batch.sequence_values["weight"][batch.seq_of]
        off = (logps + self.config.target) ** 2
        return LossOutput({Unit.TOKEN: (weight * off).sum()}, {})


@register_format("question_reply")
def question_reply(row):
    return Sample(
        id="",
        sequences=[SequenceSample([{"role": "user", "content": row["q"]}],
                                  [{"role": "assistant", "content": row["r"]}])],
        verify={"kind": "counted", "length": len(row["r"])},
    )


@register_verifier("counted")
def counted(verify, completion):
    return {"wanted": float(verify["length"]), "wrote": float(len(completion))}
'''
