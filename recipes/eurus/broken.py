"""A deliberately wrong reward objective: the recipe's bands must notice it."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.objectives.reward import Reward
from alignlab.registry import register_objective


@register_objective
class WrongSign(Reward):
    """Eurus's objective with the sign of the absolute terms turned: chosen rewards are pushed below zero."""

    name = "reward_wrong_sign"

    def absolute(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(-chosen) - logsigmoid(rejected)
