"""SFT and KTO against TRL 1.16: the same ids, the same loss and gradient norm, 1e-4 relative."""

from __future__ import annotations

import numpy as np
import pytest

from alignlab.objectives.kto import KTO, KTOConfig
from alignlab.objectives.sft import SFT, SFTConfig
from alignlab.testing import all_mismatched_pairs, one_step

pytest.importorskip("trl")
REL = 1e-4
LAYOUTS = ({"layout": "rows"}, {"layout": "tree", "max_examples": 2})


@pytest.fixture(scope="module")
def rows(tools):
    """Six prompts with one answer each, of unequal length."""
    return tools["random_rows"](3, 6, 1)


def sft_inputs(trainer, rows):
    return trainer.data_collator(
        [
            {
                "input_ids": row["prompt"] + row["answers"][0],
                "labels": [-100] * len(row["prompt"]) + row["answers"][0],
            }
            for row in rows
        ]
    )


@pytest.fixture(scope="module")
def sft_trainer(policy, tokenizer, tmp_path_factory):
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    args = TRLConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "w4 w5", "completion": "w6"}] * 2)
    return SFTTrainer(policy, args, train_dataset=data, processing_class=tokenizer)


def test_sft(sft_trainer, rows, policy, tools, tmp_path):
    theirs = tools["trl_step"](sft_trainer, sft_inputs(sft_trainer, rows))
    index = tools["index_of"](tmp_path / "index", rows)
    for options in LAYOUTS:
        ours = one_step(policy, index, SFT(), **options)
        assert ours.loss == pytest.approx(theirs[0], rel=REL)
        assert tools["gradient_norm"](ours.gradients.values()) == pytest.approx(theirs[1], rel=REL)


def test_sequence_mean_is_trl_at_one_row_a_batch(sft_trainer, rows, policy, tools, tmp_path):
    """TRL's loss of a batch is a token mean; its average over batches of one row is our ``unit=sequence``."""
    singles = [tools["trl_step"](sft_trainer, sft_inputs(sft_trainer, [row]))[0] for row in rows]
    ours = one_step(policy, tools["index_of"](tmp_path / "index", rows), SFT(SFTConfig(unit="sequence")))
    assert ours.loss == pytest.approx(np.mean(singles), rel=REL)
    assert ours.metrics["loss/token"] != pytest.approx(ours.loss, rel=REL)


@pytest.fixture(scope="module")
def kto_trainer(policy, reference, tokenizer, tmp_path_factory):
    from datasets import Dataset
    from trl import KTOConfig as TRLConfig
    from trl import KTOTrainer

    args = TRLConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=2, beta=0.3, desirable_weight=1.33,
        undesirable_weight=0.8,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "w4 w5", "completion": "w6", "label": bool(n % 2)} for n in range(4)])
    return KTOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_kto(shift, kto_trainer, rows, policy, reference, tools, tmp_path):
    """TRL's device batch is the whole step and its partners are the step plan's.

    ``shift`` moves the reference of the mismatched rows so that the KL estimate is once above 0, once clamped.
    """
    labels = [True, False, True, True, False, False]
    given = [{**row, "values": {"label": [float(label)]}} for row, label in zip(rows, labels, strict=True)]
    index = tools["index_of"](tmp_path / "index", given)
    own = [tools["logps"](reference, row["prompt"], row["answers"][0]) for row in rows]
    index.attach("reference", np.array(own, dtype=np.float32))
    objective = KTO(KTOConfig(beta=0.3, desirable_weight=1.33, undesirable_weight=0.8))
    partner = dict(all_mismatched_pairs(index, objective))
    mismatched = {
        (a, b): tools["logps"](reference, rows[a]["prompt"], rows[b]["answers"][0]) - shift for a, b in partner.items()
    }
    kto_trainer.precompute_ref_logps = True
    inputs = kto_trainer.data_collator(
        [
            {
                "prompt_ids": row["prompt"],
                "completion_ids": row["answers"][0],
                "KL_completion_ids": rows[partner[number]]["answers"][0],
                "label": labels[number],
                "ref_logps": own[number],
                "ref_KL_logps": mismatched[number, partner[number]],
            }
            for number, row in enumerate(rows)
        ]
    )
    theirs = tools["trl_step"](kto_trainer, inputs)
    metrics = {key: values[-1] for key, values in kto_trainer._metrics["train"].items()}
    assert (metrics["kl"] > 0) == (shift > 0)
    for options in LAYOUTS:
        ours = one_step(policy, index, objective, mismatched=mismatched, **options)
        assert ours.loss == pytest.approx(theirs[0], rel=REL)
        assert tools["gradient_norm"](ours.gradients.values()) == pytest.approx(theirs[1], rel=REL)
        for name in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            assert ours.metrics[name] == pytest.approx(metrics[name], rel=REL, abs=1e-6)
