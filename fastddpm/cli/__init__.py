"""The command line."""

try:
    from fastddpm.cli.main import main
except KeyboardInterrupt:  # before `main` can handle it
    raise SystemExit(130) from None

__all__ = ["main"]
