"""The columns that kernels read are those of the tables that fastddpm makes."""

import pytest

from fastddpm.core import noise
from fastddpm.core.table import COLUMNS

pytest.importorskip("triton")

from fastddpm.kernels import columns, philox


def values(*names):
    return [getattr(columns, name).value for name in names]


def test_step_columns_are_those_of_the_schedule():
    assert values(*(name.upper() for name in COLUMNS)) == list(range(14))
    assert values("STEP_COLUMNS") == [len(COLUMNS)]


def test_rows_have_no_gaps():
    noising = ["SIGNAL", "NOISE"]
    predict_step = [*noising, "OF_X_0", "OF_W", "SIGMA", "LOG_MIN", "LOG_MAX", "NOISY"]
    x_0_error = [*noising, *(f"PREDICTED_{name}" for name in ("CX", "CM", "LO", "HI", "SCALE"))]
    assert values(*noising, "NOISING_COLUMNS") == list(range(3))
    assert values(*predict_step, "PREDICT_STEP_COLUMNS") == list(range(9))
    assert values(*x_0_error, "X_0_ERROR_COLUMNS") == list(range(8))


def test_the_stream_of_a_step_is_that_of_the_noise_standard():
    assert philox.STEP_STREAM.value == noise.STEP
