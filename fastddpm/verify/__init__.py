"""`fastddpm verify`: is what runs on this machine the same function as the reference?"""

from fastddpm.verify.ladder import table, verify

__all__ = ["table", "verify"]
