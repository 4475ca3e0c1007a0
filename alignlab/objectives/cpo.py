"""Controllable Preference Optimization (arXiv 2402.19085): not contrastive preference optimization (2401.08417).

Both stages train on rows whose prompt states what is wanted of the answer (``<Helpfulness: 5> <Honesty: 3> ...``).
All that is particular to the method is in how those rows are made: ``alignlab.data.condition`` writes and parses the
condition tokens, computes the preference value R and picks conditions.  The losses are those of SFT and DPO, as in
the paper and in its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignlab.objectives.dpo import DPO, DPOConfig
from alignlab.objectives.sft import SFT, SFTConfig

NOT_CONTRASTIVE = "objective=cpo is Controllable Preference Optimization (2402.19085), not contrastive CPO (2401.08417)"


@dataclass
class CPSFTConfig(SFTConfig):
    """Options of ``objective=cpsft``: those of SFT; conditions are set under ``data.condition``."""


@dataclass
class CPOConfig(DPOConfig):
    """Options of ``objective=cpo``: those of DPO; conditions are set under ``data.condition``."""


class CPSFT(SFT):
    """First stage: ``-log p(y | c_1 .. c_m, x)``, the conditions being tokens of the prompt (paper, section 2)."""

    name = stage = "cpsft"
    Config: type = CPSFTConfig
    hints: ClassVar[dict[str, str]] = {"condition": "conditions are set under data.condition"}


class CPO(DPO):
    """Second stage: DPO on pairs that the preference value R ranks under the condition in their prompt (CDPO)."""

    name = stage = "cpo"
    Config: type = CPOConfig
    hints: ClassVar[dict[str, str]] = {
        **DPO.hints,
        "condition": "conditions are set under data.condition",
        "cpo_alpha": f"{NOT_CONTRASTIVE}; for a likelihood term use loss_type=[sigmoid,sft] loss_weights=[1.0,ALPHA]",
        "alpha": f"{NOT_CONTRASTIVE}; AlphaPO's alpha is not here",
    }
