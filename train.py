"""Train a model: python train.py model=tiny_moe optimizer.lr=1e-3

Every key of the configuration can be overridden; --help lists the choices, --cfg job shows the result, -m runs a sweep.
The same as `zoo train`.
"""

import sys

from zoo.train.run import main

if __name__ == "__main__":
    main(sys.argv[1:], program="python train.py")
