"""One model on many processes: a `Layout` applied to a `Decoder` from outside, on torch.distributed's own engine."""

from zoo.parallel.apply import parallelize
from zoo.parallel.mesh import World
from zoo.parallel.step import accumulate, clip_gradients, share_counts

__all__ = ["World", "accumulate", "clip_gradients", "parallelize", "share_counts"]
