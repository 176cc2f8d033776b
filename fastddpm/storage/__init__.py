"""Files: images, plots, data sets, shards of samples, and the fingerprint that decides whether a job may resume."""
