"""A planned run handed over: as a script that starts `zoo train` on a cluster, or as another engine's configuration."""
