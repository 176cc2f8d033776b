"""Several processes: how they meet, agree, show progress and handle signals."""
