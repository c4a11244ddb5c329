"""Training state: model, float32 masters, optimizers and step.

The model computes in its compute type; the float32 masters are what the optimizers move and what is saved.

In one process the masters are tensors beside the model's parameters, and each gradient goes to its master as soon as
the backward pass has made it, so the model's gradients are never there all at once. In float32 they are the parameters
themselves, but for matrices that the model sees changed: rows divided, or all rounded to int4 (model/int4.py). Frozen
parameters (model/lora.py) have no masters.

In several processes the masters are the parameters, each rank holding its part (DTensors, made by FSDP2): they are
whole, in the compute type, only while a function is called through `run`. With int4 they lie beside them here too.
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanollm.bundle import build_model
from nanollm.model import int4
from nanollm.model.lora import adapters, merged, plain_name
from nanollm.model.transformer import Transformer
from nanollm.train.dtensor import full_tensor, is_dtensor, to_local
from nanollm.train.optim import OptimConfig, build_optimizers
from nanollm.world import World


class ForwardWrapper(nn.Module):
    """Calls functions of a model as its forward pass: what FSDP2 does before and after that it does around them."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


@dataclass
class TrainState:
    """Model, masters, optimizers and the number of finished steps."""

    model: Transformer
    masters: dict[str, Tensor]
    optimizers: list[Optimizer]
    step: int = 0
    loss_scale: float = 1.0  # factor on the loss before the backward pass; float16 only
    scale_age: int = 0  # steps since the loss scale last changed
    losses: list[float] = field(default_factory=list)
    """Of the last steps, outliers cut; see spike_threshold in step.py."""
    unit_rows: frozenset[str] = frozenset()
    """Matrices of which the model sees every row divided by its root mean square."""
    int4_from: int | None = None
    """Finished steps from which on the model sees its matrices rounded to int4; None: never."""
    dtype: torch.dtype = torch.float32  # what the model computes in
    is_replicated: bool = True  # whether this process holds all of the masters
    wrapped: ForwardWrapper = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = ForwardWrapper(self.model)

    @classmethod
    def start(
        cls,
        model: Transformer,
        optim: OptimConfig,
        world: World,
        unit_rows: Collection[str] = (),
        int4_from: int | None = None,
    ) -> "TrainState":
        """Take a float32 model, the same on every rank, and let it compute in the world's type."""
        dtype = world.dtype
        state = cls(
            model.train(),
            {},
            [],
            loss_scale=2.0**16 if dtype == torch.float16 else 1.0,
            unit_rows=frozenset(unit_rows),
            int4_from=int4_from,
            dtype=dtype,
            is_replicated=world.is_replicated,
        )
        is_sharded = world.mesh is not None
        if is_sharded:
            for name in unit_rows if int4_from is None else ():
                model.get_submodule(name.rpartition(".")[0]).register_forward_hook(_divide_rows)
            world.fully_shard(state.wrapped, model.trunk.blocks)
        for name, parameter in model.named_parameters():
            is_own = int4_from is None or parameter.dim() == 1
            is_own &= is_sharded or (dtype == parameter.dtype and name not in unit_rows)
            master = parameter if is_own or not parameter.requires_grad else parameter.detach().clone()
            if parameter.requires_grad:
                state.masters[name] = master
            if is_sharded:
                continue
            parameter.data = parameter.data.to(dtype)  # not a new parameter: the model's modules hold this one
            if master is not parameter:
                hook = _moving(master, weakref.ref(state), has_unit_rows=name in unit_rows)
                parameter.register_post_accumulate_grad_hook(hook)
        state.optimizers = build_optimizers(state.masters, optim, dtype)
        state.copy_to_model()
        return state

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(model, ...)` with the model's parameters whole. In several processes all must call it."""
        value = self.wrapped(function, *arguments)
        if self.is_sharded and not torch.is_grad_enabled():
            modules: list[Any] = [module for module in self.wrapped.modules() if hasattr(module, "reshard")]
            for module in modules:  # without a backward pass they would stay whole, and grow old
                module.reshard()
        return value

    def set_grad_sync(self, is_last: bool) -> None:
        """Gradients need to be added up over the ranks only once, in the last backward pass of a step.

        Until then a rank that holds all of the model keeps it in the compute type as well.
        """
        if self.is_sharded:
            root: Any = self.wrapped  # FSDP2 gave it these
            root.set_requires_gradient_sync(is_last)
            root.set_reshard_after_backward(is_last or not self.is_replicated)

    def gradients(self) -> list[Tensor]:
        """Those of the masters, unscaled, as far as this rank holds them, to be changed in place."""
        for name, parameter in self.model.named_parameters() if self.is_sharded else ():
            if (master := self.masters.get(name, parameter)) is not parameter and parameter.grad is not None:
                if name in self.unit_rows:
                    whole = to_local(parameter.grad)
                    whole.copy_(_of_rows(to_local(master), whole))
                master.grad, parameter.grad = parameter.grad, None
        grads = [to_local(master.grad) for master in self.masters.values() if master.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        if self.is_sharded and self.loss_scale != 1:
            torch._foreach_div_(grads, self.loss_scale)
        return grads

    @property
    def is_sharded(self) -> bool:
        """Whether this is one of several processes that hold the masters together."""
        return is_dtensor(next(iter(self.masters.values())))

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and the model under it stays as it is."""
        return bool(adapters(self.model))

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled so that its gradients are not too small for float16."""
        return self.dtype == torch.float16

    def advance(self) -> None:
        """Count a finished step; from `int4_from` on the model sees its matrices in int4."""
        self.step += 1
        if self.step == self.int4_from:
            self.copy_to_model()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [
            (to_local(p), self._seen(name, to_local(self.masters[name])))
            for name, p in self.model.named_parameters()
            if p is not self.masters.get(name, p)
        ]
        if pairs:
            parameters, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(parameters), list(masters))

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def weights(self) -> dict[str, Tensor]:
        """The float32 masters and the persistent buffers, by the model's names: what a checkpoint holds.

        Of a model with an adapter that alone: the rest is the base's.
        """
        if self.has_adapter:
            return dict(self.masters)
        return {name: self.masters.get(name, value) for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def bundle_weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """All weights as the model sees them, whole, from the float32 masters, an adapter merged: what a bundle holds.

        All ranks must call it; those that write nothing need not keep them. In several processes they are on the CPU.
        """
        weights = dict[str, Tensor]()
        for name, value in self._whole_weights():
            if keep:
                weights[name] = value.cpu() if self.is_sharded else value
        return self._merged(weights)

    def adapter_weights(self) -> dict[str, Tensor]:
        """The adapter's masters, whole, by plain names. All ranks must call it."""
        return {plain_name(name): full_tensor(master) for name, master in self.masters.items()}

    @torch.inference_mode(False)  # DTensors cannot be looked at in it
    @torch.no_grad()
    def whole_model(self) -> Transformer:
        """A model with the weights as they stand, to look at and to sample from: in one process the trained one itself.

        In several, and with an adapter, which is merged, it is made anew, in the compute type; all must call it.
        """
        if not self.is_sharded and not self.has_adapter:
            return self.model
        model, buffers = build_model(self.model.config), dict(self.model.named_buffers())
        weights = {n: value if n in buffers else value.to(self.dtype) for n, value in self._whole_weights()}
        model.load_state_dict(self._merged(weights), assign=True)
        return model.to(self.model.head.weight.device).eval()

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and buffers as the model sees them, whole, by plain names; an adapter's by themselves."""
        for name, value in self.model.state_dict().items():
            whole = full_tensor(self.masters.get(name, value))
            yield plain_name(name), self._seen(name, whole) if name in self.masters else whole

    def _merged(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return merged(weights, adapters(self.model)[0].scale) if self.has_adapter else weights

    def _seen(self, name: str, master: Tensor) -> Tensor:
        """Whole rows of a master as the model sees them."""
        if name in self.unit_rows:
            master = master * _per_row(master)
        is_rounded = self.int4_from is not None and self.step >= self.int4_from
        return int4.rounded(name, master) if is_rounded else master


def _divide_rows(embedding: nn.Module, inputs: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """A forward hook: the rows that were looked up, each divided by its root mean square."""
    wide = rows.float()
    return (wide * _per_row(wide)).to(rows.dtype)


def _per_row(matrix: Tensor) -> Tensor:
    """(..., D) to (..., 1): one over the root mean square of each row."""
    return (matrix.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _of_rows(master: Tensor, grad: Tensor) -> Tensor:
    """The gradient of rows from that of the same rows divided by their root mean square."""
    factor = _per_row(master)
    unit = master * factor
    return factor * (grad - unit * (grad * unit).mean(-1, keepdim=True))


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
        if has_unit_rows:
            grad = _of_rows(master, grad)
        if master.grad is None:
            master.grad = grad.float() if state.loss_scale == 1 else grad.float().div_(state.loss_scale)
        else:
            master.grad.add_(grad, alpha=1 / state.loss_scale)
        parameter.grad = None

    return move
