"""The config groups of zoo, installed as the package `zoo.conf`."""
