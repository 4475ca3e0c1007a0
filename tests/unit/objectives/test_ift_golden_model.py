"""IFT on the golden model: both passes, the mixed tokens, the loss and every parameter's gradient norm.

The golden numbers are those of one padded batch with eager attention.  transformers' Llama takes RMSNorm, the rotary
angles and the eager softmax in float32 even where the model is float64, so any other order of summation (another
kernel, another packing) is 1e-8 away: 1e-9 holds for the same forward, ``FLOAT32_INSIDE`` for the others.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from alignlab.data.index import IndexWriter
from alignlab.objectives.ift import IFT, IFTConfig
from alignlab.objectives.sft import SFT, SFTConfig
from alignlab.testing import one_step
from alignlab.types import EncodedSample, EncodedSequence

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "ift_model"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/golden is not beside this checkout")
FLOAT32_INSIDE = 2e-7
LAYOUTS = [
    {"layout": "rows", "max_examples": 1},
    {"layout": "packed"},
    {"layout": "tree", "max_examples": 3, "dp": 2},
]


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "ift.json").read_text())


@pytest.fixture(scope="module")
def index(expected, tmp_path_factory):
    with IndexWriter(tmp_path_factory.mktemp("golden") / "index") as writer:
        for number, row in enumerate(expected["sequences"]):
            tokens = np.array(row["input_ids"], dtype=np.int32)
            sequence = EncodedSequence(tokens, np.arange(len(tokens)) >= row["prompt_length"])
            writer.add(EncodedSample(str(number), "", [sequence], np.zeros((0, 2), dtype=np.int32), {}, {}))
        return writer.close({})


def model(dtype, attention="sdpa"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=dtype, attn_implementation=attention)


class Recording(IFT):
    """Keeps the tokens mixed in, by sequence number."""

    def __init__(self, config):
        super().__init__(config)
        self.residual = {}

    def _mix(self, score, batch, context, strength):
        mix = super()._mix(score, batch, context, strength)
        for s, number in enumerate(batch.sequence_ids.tolist()):
            own = batch.seq_idx[batch.seq_ptr[s] : batch.seq_ptr[s + 1]]
            self.residual[number] = mix.residual[own].tolist()
        return mix


def compare(found, objective, expected, rel):
    assert found.loss == pytest.approx(expected["loss"], rel=rel)
    norms = {name: float(g.double().norm()) for name, g in found.gradients.items()}
    assert sum(n**2 for n in norms.values()) ** 0.5 == pytest.approx(expected["grad_norm"], rel=rel)
    for name, norm in expected["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=rel), name
    for number, (row, tokens) in enumerate(zip(expected["sequences"], expected["residual_tokens"], strict=True)):
        assert objective.residual[number] == tokens[row["prompt_length"] :]


def objective_of(expected):
    return Recording(IFTConfig(max_lambda=expected["lambda_"], gamma=expected["gamma"]))


def test_the_same_forward(expected, index):
    objective = objective_of(expected)
    found = one_step(model(torch.float64, "eager"), index, objective, naive=True)
    compare(found, objective, expected, 1e-9)


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: " ".join(map(str, o.values())))
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, FLOAT32_INSIDE), (torch.float32, 2e-5)], ids=["64", "32"])
def test_every_layout(dtype, rel, options, expected, index):
    objective = objective_of(expected)
    compare(one_step(model(dtype), index, objective, **options), objective, expected, rel)


def test_first_pass_loss(expected, index):
    found = one_step(model(torch.float64), index, SFT(SFTConfig(unit="sequence")), layout="tree")
    assert found.loss == pytest.approx(expected["sft_loss"], rel=FLOAT32_INSIDE)


def test_frozen_embeddings_get_no_gradient(expected, index):
    given = {"max_lambda": expected["lambda_"], "gamma": expected["gamma"], "embeddings": "frozen"}
    found = one_step(model(torch.float64), index, IFT(IFTConfig(**given)), layout="tree")
    embeddings = found.gradients["model.embed_tokens.weight"]
    assert found.loss == pytest.approx(expected["loss"], rel=FLOAT32_INSIDE)
    assert not embeddings.any()
    assert found.gradients["lm_head.weight"].any()
