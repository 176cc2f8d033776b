"""Several processes that share a job: how they communicate, report progress and handle signals."""
