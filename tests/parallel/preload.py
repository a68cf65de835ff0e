"""What the processes of the pool share from the start: all that takes long to import or to compose."""

import torch
import torch._dynamo  # `fully_shard` imports it when it is first called
import torch.distributed.fsdp
import torch.distributed.tensor

import zoo.parallel  # noqa: F401
from tests.parallel.cases import OPTIONS, TWINS, spec_of

torch.set_num_threads(1)
for name in (*TWINS, *OPTIONS):
    spec_of(name)
