"""The names of options are those that the code behind them knows."""

from fastddpm.core import names
from fastddpm.core.precision import PRECISIONS
from fastddpm.evaluate.features import SCALES


def test_names_are_those_of_the_tables():
    assert tuple(PRECISIONS) == names.PRECISION_NAMES
    assert tuple(SCALES) == names.SCALE_NAMES
