"""What changes while a model is trained?

The model computes in its compute type; the float32 masters are what the optimizers move and what is saved. In float32
the masters are the model's own parameters, but for matrices whose rows the model sees divided. Elsewhere each gradient
goes to its master as soon as the backward pass has made it, so the model's gradients are never there all at once.
"""

import weakref
from collections.abc import Callable, Collection
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
    unit_rows: frozenset[str] = frozenset()
    """Matrices of which the model sees every row divided by its root mean square."""

    @classmethod
    def start(
        cls, model: Transformer, optim: OptimConfig, dtype: torch.dtype, unit_rows: Collection[str] = ()
    ) -> "TrainState":
        """Take a float32 model and let it compute in `dtype`."""
        parameters, masters = dict(model.named_parameters()), dict[str, Tensor]()
        for name, parameter in parameters.items():
            is_own = dtype == torch.float32 and name not in unit_rows
            masters[name] = parameter if is_own else parameter.detach().clone()
            parameter.data = parameter.data.to(dtype)
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        optimizers = build_optimizers(masters, optim, dtype)
        state = cls(model.train(), masters, optimizers, loss_scale=scale, unit_rows=frozenset(unit_rows))
        for name, parameter in parameters.items():
            if masters[name] is not parameter:
                hook = _moving(masters[name], weakref.ref(state), has_unit_rows=name in unit_rows)
                parameter.register_post_accumulate_grad_hook(hook)
        state.publish()
        return state

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled so that its gradients are not too small for float16."""
        return next(self.model.parameters()).dtype == torch.float16

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, self._seen(name)) for name, p in self.model.named_parameters() if p is not self.masters[name]]
        if pairs:
            parameters, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(parameters), list(masters))

    def drop_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def weights(self) -> dict[str, Tensor]:
        """The float32 masters and the persistent buffers, by the model's names: what a checkpoint holds."""
        return {name: self.masters.get(name, value) for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def bundle_weights(self) -> dict[str, Tensor]:
        """The same in float32 as the model sees them: what a bundle holds."""
        return self.weights() | {name: self._seen(name) for name in self.unit_rows}

    def _seen(self, name: str) -> Tensor:
        """A master as the model sees it, in float32."""
        master = self.masters[name]
        return master * _per_row(master) if name in self.unit_rows else master


def _per_row(matrix: Tensor) -> Tensor:
    """(R, D) to (R, 1): one over the root mean square of each row."""
    return (matrix.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _moving(
    master: Tensor, owner: "weakref.ref[TrainState]", *, has_unit_rows: bool = False
) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient, unscaled, to that of its master in float32, and drops it.

    It refers weakly to the state, which would else be freed late; a model that outlives its state keeps its gradients.
    """

    @torch.no_grad()
    def move(parameter: Tensor) -> None:
        state, grad = owner(), parameter.grad
        if state is None or grad is None:
            return
        if has_unit_rows:  # of the row that was divided to the row itself
            factor = _per_row(master)
            unit = master * factor
            grad = factor * (grad - unit * (grad * unit).mean(-1, keepdim=True))
        if master.grad is None:
            master.grad = grad.float() if state.loss_scale == 1 else grad.float().div_(state.loss_scale)
        else:
            master.grad.add_(grad, alpha=1 / state.loss_scale)
        parameter.grad = None

    return move
