"""Parameters that are stored as DTensors and seen as plain tensors: a block works with its part and knows of no other.

Outside a forward pass a parameter is a DTensor with its canonical name and whole shape, so that optimizers, norms and
checkpoints know its placement. Inside, the module finds the part that is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor


@dataclass(frozen=True)
class Cut:
    """How a parameter is stored over a mesh, and what of it a process works with.

    The default is a parameter that every process has whole and uses for its own tokens or heads: its gradient is the
    sum over all of them.
    """

    placements: tuple[Placement, ...] = (Replicate(),)
    rows: Tensor | None = None
    """int64: of a parameter that is stored whole, the rows that this process works with; None: all."""
    axis: int = 0
    """Of `rows`."""
    silent: bool = False
    """This process sees zeros: of a bias that is added to partial sums, which only one of them may add."""

    def own(self, parameter: Tensor) -> Tensor:
        """What a forward pass sees of a DTensor. Differentiable."""
        assert isinstance(parameter, DTensor)
        # A gradient of what several processes have whole is a part of a sum.
        arriving = [Partial() if placement.is_replicate() else placement for placement in self.placements]
        own = parameter.to_local(grad_placements=arriving)
        if self.rows is not None:
            own = own.index_select(self.axis, self.rows)
        return own * 0 if self.silent else own


def cut_parameters(module: nn.Module, cuts: Mapping[str, Cut], mesh: DeviceMesh) -> None:
    """Store the parameters that `module` itself holds as `cuts` say. Every process has them whole before."""
    for name, cut in cuts.items():
        whole = module._parameters[name]
        assert whole is not None
        stored = distribute_tensor(whole.detach(), mesh, cut.placements, src_data_rank=None)
        module.register_parameter(name, nn.Parameter(stored, requires_grad=whole.requires_grad))


@contextmanager
def own_parameters(module: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[None]:
    """Let `module` see its parts of the parameters in `cuts`."""
    stored = {name: module._parameters[name] for name in cuts}
    module._parameters.update({name: cuts[name].own(whole) for name, whole in stored.items()})  # type: ignore[arg-type, misc]
    try:
        yield
    finally:
        module._parameters.update(stored)


def cut_module(module: nn.Module, cuts: Mapping[str, Cut], mesh: DeviceMesh) -> None:
    """`cut_parameters`, and let the forward passes of `module` see its own parts."""
    if not cuts:
        return
    cut_parameters(module, cuts, mesh)
    compute = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with own_parameters(module, cuts):
            return compute(*args, **kwargs)

    module.forward = forward
