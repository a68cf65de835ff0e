"""Names the packages; everything else about the distribution is in pyproject.toml.

`conf/` stands beside `zoo/` in the tree and is installed inside it, as `zoo.conf`. A search for packages cannot
rename a folder, and a list in pyproject.toml would have to repeat every folder of zoo/.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["zoo", "zoo.*"]), "zoo.conf"], package_dir={"zoo.conf": "conf"})
