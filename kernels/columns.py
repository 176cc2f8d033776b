"""The columns of the tables of coefficients that kernels read. Proof: tests/kernels/test_columns.py."""

import triton.language as tl

# A row of a step table: the columns of fastddpm.core.table.COLUMNS, in their order.
CX = tl.constexpr(0)
CM = tl.constexpr(1)
LO = tl.constexpr(2)
HI = tl.constexpr(3)
A = tl.constexpr(4)
B = tl.constexpr(5)
C = tl.constexpr(6)
S = tl.constexpr(7)
L = tl.constexpr(8)
V = tl.constexpr(9)
P = tl.constexpr(10)
Q = tl.constexpr(11)
R = tl.constexpr(12)
U = tl.constexpr(13)
STEP_COLUMNS = tl.constexpr(14)

# A row of a noising table. The rows of predict_step and x_0_error begin with the same two columns.
SIGNAL = tl.constexpr(0)  # sqrt(abar_t)
NOISE = tl.constexpr(1)  # sqrt(1 - abar_t)
NOISING_COLUMNS = tl.constexpr(2)

# The other columns of a row of predict_step.
OF_X_0 = tl.constexpr(2)  # coefficients of the mean
OF_W = tl.constexpr(3)
SIGMA = tl.constexpr(4)
LOG_MIN = tl.constexpr(5)  # bounds of the log variance, for learned_range
LOG_MAX = tl.constexpr(6)
NOISY = tl.constexpr(7)  # 0: the step adds no noise
PREDICT_STEP_COLUMNS = tl.constexpr(8)

# The other columns of a row of x_0_error: x_0 = scale clamp(cx x_t + cm m, lo, hi).
PREDICTED_CX = tl.constexpr(2)
PREDICTED_CM = tl.constexpr(3)
PREDICTED_LO = tl.constexpr(4)
PREDICTED_HI = tl.constexpr(5)
PREDICTED_SCALE = tl.constexpr(6)
X_0_ERROR_COLUMNS = tl.constexpr(7)
