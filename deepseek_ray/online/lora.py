"""Low-rank adapters: the champion's weights stay, small matrices beside its linear layers learn, and are merged in.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv:2106.09685, by the peft package
(``pip install 'deepseek-ray[lora]'``). Experts, norms and the router stay as they are.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.models import RiskModel
from deepseek_ray.online.rehearsal import Replay
from deepseek_ray.online.strategy import Material


class Lora(Replay):
    """Replay that trains adapters only; the exported model has the champion's shape.

    Raises:
        EnvironmentProblemError: peft is not installed.
    """

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self._peft = _import_peft()
        self._adapted: Any = None

    def prepare(self, model: RiskModel) -> None:
        """Freeze the weights and put an adapter beside every linear layer."""
        config = self.material.config
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        lora = self._peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=linear)
        holder = nn.ModuleList([model])  # peft would read the model's own config as one of transformers
        self._adapted = self._peft.LoraModel(holder, lora, "default")

    def finish(self, model: RiskModel) -> None:
        """Add each adapter's product to its layer's weight, and take the adapters away."""
        self._adapted.merge_and_unload()


def _import_peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages below it
            import peft
    except ImportError as error:
        raise EnvironmentProblemError(
            "update.strategy=lora needs the package 'peft', which is not installed.",
            fix="pip install 'deepseek-ray[lora]', or choose another update.strategy",
        ) from error
    return peft
