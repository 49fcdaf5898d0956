"""The best epoch of a run by a figure of its validation, and its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fivefold.choose import choose

MONITORS = {"loss": 1, "logloss": 1, "acc": -1, "f1_macro": -1}
"""Figures of the validation that may choose the best epoch: 1 where less is better, -1 where more is."""


@dataclass
class Best:
    """The best epoch so far by one figure, and the weights of it."""

    monitor: str
    epoch: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> bool:
        """Keeps this epoch's weights if its score is better than all before; whether it is."""
        sign = choose(MONITORS, "monitor", self.monitor)
        if self.epoch and sign * scores[self.monitor] >= sign * self.scores[self.monitor]:
            return False
        self.keep(epoch, scores, model)
        return True

    def keep(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        self.epoch, self.scores = epoch, dict(scores)
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
