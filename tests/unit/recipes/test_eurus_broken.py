"""The wrong sign of recipes/eurus: it is Eurus's objective with the absolute terms of the opposite rewards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from alignlab.objectives.reward import Reward

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "eurus"


def test_the_wrong_sign_pushes_chosen_rewards_down() -> None:
    spec = importlib.util.spec_from_file_location("eurus_broken", RECIPE / "broken.py")
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    chosen, rejected = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 2.0])
    wrong = broken.WrongSign().absolute(chosen, rejected)
    assert torch.equal(wrong, Reward().absolute(-chosen, -rejected))
    assert broken.WrongSign().absolute(chosen - 1, rejected).lt(wrong).all()
    assert Reward().absolute(chosen - 1, rejected).gt(Reward().absolute(chosen, rejected)).all()
