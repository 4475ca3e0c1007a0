"""Losses of one preference pair, as pure functions: one for each ``loss_type``.

Every function takes :class:`PairTerms` and gives the loss of each pair, [P]; none knows of batches, means or models.
Names and definitions are those of TRL 1.16 (``DPOTrainer``; ``simpo`` of its contrastive ``CPOTrainer``, ``orpo`` of
its ``ORPOTrainer``).  Departures: ``label_smoothing`` also acts on ``sigmoid``, as in the original DPO code's
conservative variant (TRL 1.16 ignores it there; at 0 both agree); ``kto_pair`` is TRL 0.7's, removed since.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairOptions(Protocol):
    """Numbers of a pair loss.  A loss reads those it uses and no others: what nothing read is refused to the user."""

    beta: float
    label_smoothing: float
    simpo_gamma: float | None


class PairTerms(NamedTuple):
    """What a pair loss may see.  All tensors are [P]."""

    chosen: Tensor
    """log pi(y_w|x) - log pi_ref(y_w|x), summed over the target tokens"""
    rejected: Tensor
    chosen_logps: Tensor
    """log pi(y_w|x), summed; no reference in it"""
    rejected_logps: Tensor
    chosen_length: Tensor
    """number of target tokens"""
    rejected_length: Tensor
    options: PairOptions
    shift: Tensor | float = 0.0
    """running mean of the rewards (``bco_pair`` only)"""

    @property
    def beta(self) -> float:
        return self.options.beta

    @property
    def label_smoothing(self) -> float:
        return self.options.label_smoothing

    @property
    def simpo_gamma(self) -> float:
        gamma = self.options.simpo_gamma
        return 0.5 if gamma is None else gamma


PairLoss = Callable[[PairTerms], Tensor]


def sigmoid(t: PairTerms) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing, conservative DPO: a share epsilon of labels is flipped."""
    logits = t.beta * (t.chosen - t.rejected)
    if not t.label_smoothing:
        return -logsigmoid(logits)
    return -(1 - t.label_smoothing) * logsigmoid(logits) - t.label_smoothing * logsigmoid(-logits)


def ipo(t: PairTerms) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) on log-ratios averaged over tokens; ``beta`` is the paper's tau."""
    difference = t.chosen / t.chosen_length - t.rejected / t.rejected_length
    return (difference - 1 / (2 * t.beta)) ** 2


def hinge(t: PairTerms) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425) on DPO's logits."""
    return torch.relu(1 - t.beta * (t.chosen - t.rejected))


def robust(t: PairTerms) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased under a flip rate epsilon = ``label_smoothing`` below one half."""
    logits = t.beta * (t.chosen - t.rejected)
    epsilon = t.label_smoothing
    return (epsilon * logsigmoid(-logits) - (1 - epsilon) * logsigmoid(logits)) / (1 - 2 * epsilon)


def exo_pair(t: PairTerms) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16), K = 2: KL from the policy's preference to the smoothed label's."""
    logits = t.beta * (t.chosen - t.rejected)
    epsilon = t.label_smoothing
    win, lose = logsigmoid(logits), logsigmoid(-logits)
    return win.exp() * (win - math.log1p(-epsilon)) + lose.exp() * (lose - math.log(epsilon))


def nca_pair(t: PairTerms) -> Tensor:
    """NCA for a pair (arXiv 2402.05369): keeps a floor under the chosen answer's likelihood."""
    chosen, rejected = t.beta * t.chosen, t.beta * t.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(t: PairTerms) -> Tensor:
    """BCO (arXiv 2404.04656): a classifier on implicit rewards, which are compared with ``shift``.

    TRL 1.16 has no shift (0); the paper, and TRL before 1.0, subtract the running mean of the rewards.
    """
    return -logsigmoid(t.beta * t.chosen - t.shift) - logsigmoid(t.shift - t.beta * t.rejected)


def sppo_hard(t: PairTerms) -> Tensor:
    """SPPO (arXiv 2405.00675, eq. 4.7) with win probability 1 for the chosen and 0 for the rejected answer."""
    return (t.chosen - 0.5 / t.beta) ** 2 + (t.rejected + 0.5 / t.beta) ** 2


def apo_zero(t: PairTerms) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): chosen answers are better than the model's own."""
    return torch.sigmoid(-t.beta * t.chosen) + torch.sigmoid(t.beta * t.rejected)


def apo_down(t: PairTerms) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): chosen answers are worse than the model's own."""
    return torch.sigmoid(t.beta * t.chosen) + torch.sigmoid(-t.beta * (t.chosen - t.rejected))


def simpo(t: PairTerms) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): mean log-probabilities, a target margin gamma, no reference."""
    difference = t.chosen_logps / t.chosen_length - t.rejected_logps / t.rejected_length
    logits = t.beta * difference - t.simpo_gamma
    if not t.label_smoothing:
        return -logsigmoid(logits)
    return -(1 - t.label_smoothing) * logsigmoid(logits) - t.label_smoothing * logsigmoid(-logits)


def orpo(t: PairTerms) -> Tensor:
    """ORPO's odds-ratio term (arXiv 2403.07691, eq. 7), ``beta`` being the paper's lambda.

    The likelihood term of the chosen answer, which runs over tokens, is added by the objective.
    """
    chosen, rejected = t.chosen_logps / t.chosen_length, t.rejected_logps / t.rejected_length
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -t.beta * logsigmoid(log_odds)


def kto_pair(t: PairTerms, chosen_kl: Tensor, rejected_kl: Tensor) -> Tensor:
    """Paired KTO of TRL 0.7 (UltraMedical's), given both KL estimates: half the sum of its two terms.

    TRL concatenates the two terms of all pairs and averages, so one pair's share is their mean.
    """
    win = torch.sigmoid(-t.beta * (t.chosen - rejected_kl))
    lose = torch.sigmoid(-t.beta * (chosen_kl - t.rejected))
    return 0.5 * (win + lose)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 without cancellation; x is held just below 0, where it diverges."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x < -math.log(2), torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "exo_pair": exo_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "orpo": orpo,
    "sppo_hard": sppo_hard,
}
"""Losses that look at one pair alone; ``kto_pair`` also needs the step, ``sft`` runs over tokens."""

LOSS_TYPES = (*PAIR_LOSSES, "kto_pair", "sft")
REFERENCE_FREE = frozenset({"simpo", "orpo", "sft"})
"""Losses that never look at the reference."""
WITH_LIKELIHOOD = frozenset({"orpo", "sft"})
"""Losses with a negative log-likelihood term over the chosen answer's tokens."""
