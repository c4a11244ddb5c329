"""What changes while a model is trained?

The model computes in its compute type; the float32 masters are what the optimizers move and what is saved. In float32
the masters are the model's own parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanollm.model.transformer import Transformer
from nanollm.train.optim import OptimConfig, build_optimizers


@dataclass
class TrainState:
    """Model, masters, optimizers and the number of finished steps."""

    model: Transformer
    masters: dict[str, Tensor]
    optimizers: list[Optimizer]
    step: int = 0
    loss_scale: float = 1.0
    """Factor on the loss before the backward pass; float16 only."""
    scale_age: int = 0
    """Steps since the loss scale last changed."""

    @classmethod
    def start(cls, model: Transformer, optim: OptimConfig, dtype: torch.dtype) -> "TrainState":
        """Take a float32 model and let it compute in `dtype`."""
        parameters = dict(model.named_parameters())
        if dtype == torch.float32:
            masters: dict[str, Tensor] = dict(parameters)
        else:
            masters = {name: p.detach().clone() for name, p in parameters.items()}
            for parameter in parameters.values():
                parameter.data = parameter.data.to(dtype)
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        return cls(model.train(), masters, build_optimizers(masters, optim, dtype), loss_scale=scale)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled so that its gradients are not too small for float16."""
        return next(self.model.parameters()).dtype == torch.float16

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the model's gradients, unscaled, to those of the masters, in float32, and drop them from the model."""
        for name, parameter in self.model.named_parameters():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            grad = parameter.grad.float() / self.loss_scale
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, self.masters[name]) for name, p in self.model.named_parameters() if p is not self.masters[name]]
        if pairs:
            parameters, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(parameters), list(masters))

    def drop_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def weights(self) -> dict[str, Tensor]:
        """The float32 masters and the persistent buffers, by the model's names: what a bundle holds."""
        return {name: self.masters.get(name, value) for name, value in self.model.state_dict().items()}
