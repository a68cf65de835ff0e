"""Random weights for a model that no process has whole: drawn part by part, of which each process keeps its own."""

from __future__ import annotations

from collections import Counter

import torch

from zoo.decoder import Decoder, build
from zoo.parallel.pieces import Known, Pieces


@torch.no_grad()
def fill(model: Decoder, seed: int, device: torch.device) -> None:
    """Give a model that was spread while it was on the meta device the weights that it would have been built with.

    Every process draws all of them, one layer at a time, which is all that is in memory beside its own parts.
    """
    dtypes = Counter(parameter.dtype for parameter in model.parameters())
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    targets, known = model.state_dict(), Known()
    # Few parameters keep a dtype of their own.
    whole = build(model.spec, "meta", dtypes.most_common(1)[0][0])
    torch.manual_seed(seed)
    for name, part in whole.parts():
        part.to_empty(device="cpu")
        for buffer in part.buffers():
            buffer.zero_()
        whole.reset_part(name, part)
        for own, value in part.state_dict().items():
            target = targets.get(f"{name}.{own}")
            if target is not None:  # else another stage of a pipeline has it
                for box, view in Pieces(target, known).boxes():
                    view.copy_(value[box])
        part.to("meta")
