"""Freezing: a part of a network stays as it is for the first steps."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class Freezing:
    """Keeps every parameter and every running statistic of `part` for `steps` steps, then lets them go.

    Its norms with running statistics are in eval mode whenever they run, whatever mode the loop
    sets: they normalise by what they know and learn nothing. Dropout stays as it is. To be made
    after optimiser, update and average, which know all parameters from the start.
    """

    def __init__(self, part: nn.Module, steps: int) -> None:
        self.left = steps
        self._frozen = [parameter for parameter in part.parameters() if parameter.requires_grad]
        norms = [module for module in part.modules() if isinstance(module, _NormBase)]
        self._hooks = [norm.register_forward_pre_hook(_stay) for norm in norms]
        self._learn(False)

    def __call__(self) -> None:
        """To be called after each step."""
        self.left -= 1
        if self.left == 0:
            self._let_go()

    def state_dict(self) -> dict[str, int]:
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.left = state["left"]
        if self.left <= 0:
            self._let_go()

    def _let_go(self) -> None:
        self._learn(True)
        for hook in self._hooks:
            hook.remove()

    def _learn(self, wanted: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(wanted)


def _stay(module: nn.Module, _: object) -> None:
    module.eval()
