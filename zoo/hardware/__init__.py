"""The machine that this process runs on: what it is, and how fast it is. Torch is imported only when it is asked."""

from zoo.hardware.local import local_hardware
from zoo.hardware.speed import Speed, measure

__all__ = ["Speed", "local_hardware", "measure"]
