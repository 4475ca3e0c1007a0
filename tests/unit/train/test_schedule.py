"""The learning rate of every step, against the Hugging Face schedulers that recipes name."""

from __future__ import annotations

import pytest
import torch

from alignlab.config import OptimConfig
from alignlab.errors import ConfigError
from alignlab.train.schedule import SCHEDULES, learning_rate, warmup_steps


@pytest.mark.parametrize(("name", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", None)])
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (7, 7), (1, 0), (1, 1)])
def test_equals_transformers(name: str, theirs: str | None, total: int, warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(
        theirs or "constant_with_warmup", optimizer, num_warmup_steps=warmup, num_training_steps=total
    )
    config = OptimConfig(learning_rate=0.3, lr_scheduler_type=name, warmup_steps=warmup)
    for step in range(total):
        assert learning_rate(config, step, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_ratio_is_rounded_up_and_a_number_overrides_it() -> None:
    assert warmup_steps(OptimConfig(warmup_ratio=0.1), 11) == 2
    assert warmup_steps(OptimConfig(warmup_ratio=0.1, warmup_steps=0), 11) == 0


def test_an_unknown_schedule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(SCHEDULES)):
        learning_rate(OptimConfig(lr_scheduler_type="cosin", warmup_steps=0), 1, 3)
