"""What the loader says of the micro-batch at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch

from alignlab.data.index import Index
from alignlab.data.loader import Loader
from alignlab.data.plan import sequential
from alignlab.types import Unit


def test_the_current_rows_are_named_longest_first(make_index: Callable[..., Index]) -> None:
    index = make_index(6, longest=9)
    loader = Loader(index, "packed", torch.device("cpu"), torch.float32, 0)
    assert loader.current_text() == "no row"
    plan = sequential(
        index, unit=Unit.SEQUENCE, token_budget=30, max_examples=None, dp=1, layout="packed", mixes_inputs=False
    )
    for batch in loader.of(plan):
        lengths = {
            f"{sample.id} ({len(sequence.tokens)} tokens)": len(sequence.tokens)
            for sample in (index.sample(i) for i in range(len(index)))
            for sequence in sample.sequences
        }
        said = loader.current_text().split(", ")
        assert len(said) == len(batch.sequence_ids)
        assert [lengths[one] for one in said] == sorted((lengths[one] for one in said), reverse=True)
