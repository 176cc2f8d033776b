"""`fastddpm verify`: does this machine compute the same function as the reference?"""

from fastddpm.verify.accuracy import Record
from fastddpm.verify.ladder import verify
from fastddpm.verify.table import summary, table

__all__ = ["Record", "summary", "table", "verify"]
