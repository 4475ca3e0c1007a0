"""DPO's losses and reward models against TRL 1.16: the same ids, the same loss and gradient norm, 1e-4 relative."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignlab.objectives.dpo import DPO, DPOConfig
from alignlab.objectives.pair_losses import PAIR_LOSSES, PairTerms
from alignlab.objectives.reward import Reward, RewardConfig
from alignlab.testing import one_step, tiny_model

pytest.importorskip("trl")
REL = 1e-4
WORDS = {"prompt": "w4 w5", "chosen": "w6", "rejected": "w7"}


def config(kind, folder, **options):
    return kind(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **options)


@pytest.fixture(scope="module")
def rows(tools):
    """Six pairs; answers of one prompt differ in length, two share their first tokens."""
    rows = tools["random_rows"](0, 6, 2)
    rows[1]["answers"][1] = rows[1]["answers"][0][:1] + rows[1]["answers"][1]
    rows[2]["answers"][1] = rows[2]["answers"][0] + [9, 8]
    return [{**row, "pairs": [(0, 1)]} for row in rows]


@pytest.fixture(scope="module")
def dpo_trainer(policy, reference, tokenizer, tmp_path_factory):
    from datasets import Dataset
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    args = config(TRLConfig, tmp_path_factory.mktemp("trl"), beta=0.3, gradient_checkpointing=False)
    data = Dataset.from_list([WORDS] * 2)
    return DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer)


@pytest.fixture(scope="module")
def dpo_inputs(dpo_trainer, rows):
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = [dict(zip(keys, (row["prompt"], *row["answers"]), strict=True)) for row in rows]
    return dpo_trainer.data_collator(batch)


@pytest.fixture(scope="module")
def dpo_index(rows, reference, tools, tmp_path_factory):
    index = tools["index_of"](tmp_path_factory.mktemp("dpo") / "index", rows)
    numbers = [tools["logps"](reference, row["prompt"], answer) for row in rows for answer in row["answers"]]
    index.attach("reference", np.array(numbers, dtype=np.float32))
    return index


CASES = [
    (["sigmoid"], None, 0.0),
    (["ipo"], None, 0.0),
    (["hinge"], None, 0.0),
    (["robust"], None, 0.1),
    (["exo_pair"], None, 1e-3),
    (["nca_pair"], None, 0.0),
    (["bco_pair"], None, 0.0),
    (["sppo_hard"], None, 0.0),
    (["apo_zero"], None, 0.0),
    (["apo_down"], None, 0.0),
    (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], 0.0),
]


@pytest.mark.parametrize(("types", "weights", "smoothing"), CASES, ids=lambda v: str(v))
def test_dpo_losses(types, weights, smoothing, dpo_trainer, dpo_inputs, dpo_index, policy, tools):
    dpo_trainer.loss_types = types
    dpo_trainer.loss_weights = weights or [1.0] * len(types)
    dpo_trainer.label_smoothing = smoothing
    theirs = tools["trl_step"](dpo_trainer, dict(dpo_inputs))
    metrics = {key: values[-1] for key, values in dpo_trainer._metrics["train"].items()}
    objective = DPO(DPOConfig(loss_type=types, loss_weights=weights, beta=0.3, label_smoothing=smoothing))
    for options in ({"layout": "rows"}, {"layout": "tree", "max_examples": 2}):
        ours = one_step(policy, dpo_index, objective, **options)
        assert ours.loss == pytest.approx(theirs[0], rel=REL)
        assert tools["gradient_norm"](ours.gradients.values()) == pytest.approx(theirs[1], rel=REL)
        for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            assert ours.metrics[name] == pytest.approx(metrics[name], rel=REL)


def terms(seed=0):
    """Log-probabilities of five pairs and their lengths, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2, 5), generator=generator).double()
    sums = (-lengths * (0.1 + 2 * torch.rand(2, 5, generator=generator, dtype=torch.float64))).requires_grad_()
    return sums, lengths


def test_simpo_is_that_of_the_contrastive_trainer():
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    sums, lengths = terms()
    for smoothing in (0.0, 0.1):
        stand_in = SimpleNamespace(
            loss_type="simpo", beta=2.0, simpo_gamma=1.2, alpha=0.0, label_smoothing=smoothing,
            accelerator=SimpleNamespace(device="cpu"),
        )  # fmt: skip
        theirs = trainer.cpo_loss(stand_in, *(sums / lengths))[0]
        options = DPOConfig(beta=2.0, label_smoothing=smoothing, simpo_gamma=1.2)
        given = PairTerms(*sums, *sums, *lengths, options=options)
        assert_same(PAIR_LOSSES["simpo"](given), theirs, sums, rtol=1e-12)


def test_orpo_is_that_of_its_trainer():
    """TRL computes the odds ratio in fp32.  Its likelihood term also runs over the prompt; ours over the answer."""
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    sums, lengths = terms()
    stand_in = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    ratio_loss = -trainer.odds_ratio_loss(stand_in, *(sums / lengths))[0]
    given = PairTerms(*sums, *sums, *lengths, options=DPOConfig(beta=0.25))
    assert_same(PAIR_LOSSES["orpo"](given), ratio_loss, sums, rtol=1e-4)


def assert_same(ours, theirs, leaf, rtol):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0, check_dtype=False)
    gradients = [torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-9)


@pytest.fixture(scope="module")
def reward_trainer(tokenizer, tmp_path_factory):
    from datasets import Dataset
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    args = config(TRLConfig, tmp_path_factory.mktemp("trl"), gradient_checkpointing=False)
    data = Dataset.from_list([WORDS] * 2)
    return RewardTrainer(tiny_model("scalar", 0).float(), args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centre", [None, 0.1])
def test_reward(centre, margin, reward_trainer, rows, tools, tmp_path):
    margins = [0.1 * number for number in range(len(rows))]
    batch = [{"chosen_ids": r["prompt"] + r["answers"][0], "rejected_ids": r["prompt"] + r["answers"][1]} for r in rows]
    given = [{**row, "pair_values": {"margin": [m]}} for row, m in zip(rows, margins, strict=True)]
    if margin:
        batch = [{**example, "margin": m} for example, m in zip(batch, margins, strict=True)]
    reward_trainer.args.center_rewards_coefficient = centre
    theirs = tools["trl_step"](reward_trainer, reward_trainer.data_collator(batch))
    metrics = {key: values[-1] for key, values in reward_trainer._metrics["train"].items()}
    index = tools["index_of"](tmp_path / "index", given)
    objective = Reward(RewardConfig(margin=margin, center_rewards_coefficient=centre))
    for options in ({"layout": "rows"}, {"layout": "tree", "max_examples": 2}):
        ours = one_step(reward_trainer.model, index, objective, **options)
        assert ours.loss == pytest.approx(theirs[0], rel=REL)
        assert tools["gradient_norm"](ours.gradients.values()) == pytest.approx(theirs[1], rel=REL)
        for name in ("accuracy", "margin", "mean_reward"):
            assert ours.metrics[name] == pytest.approx(metrics[name], rel=REL)
