"""The table that `fastddpm verify` prints."""

import math
from dataclasses import replace

from fastddpm.verify.accuracy import Record
from fastddpm.verify.table import summary, table


def test_table_has_a_line_per_comparison_then_errors_and_verdict():
    records = [
        Record("step", "update by torch with the float32 reference", 0, 0),
        Record("unet", "fp32 U-Net, max", 1.25e-6, 2e-6),
        Record("engines", "CUDA graph with eager", note="cpu has no CUDA graphs"),
        Record(
            "trajectory", "bf16 trajectory", 0.001, 0.0015, "PSNR of x_0 40.0 dB", [(11, 1e-4, 2e-4), (0, 1e-3, 9e-4)]
        ),
    ]
    head, step, unet, engines, trajectory, along, points, verdict = table(records).splitlines()
    assert head.split() == ["rung", "compared", "error", "bound"]
    assert step == "step        update by torch with the float32 reference  0 differ  equal   pass"
    assert unet.split() == ["unet", "fp32", "U-Net,", "max", "1.25e-06", "2e-06", "pass"]
    assert engines.endswith("  skipped  cpu has no CUDA graphs")
    assert trajectory.endswith("0.001     0.0015  pass     PSNR of x_0 40.0 dB")
    assert along == "bf16 trajectory, rms error after t (plain torch's):"
    assert points == "  11: 1.0e-04 (2.0e-04), 0: 1.0e-03 (9.0e-04)"
    assert verdict == "passed: all 3 comparisons; 1 skipped"

    records[0] = replace(records[0], error=7)
    records[1] = replace(records[1], error=math.nan)
    _, step, unet, *_, verdict = table(records).splitlines()
    assert step.endswith("7 differ  equal   FAIL")
    assert unet.split()[-3:] == ["nan", "2e-06", "FAIL"]
    assert verdict == "FAILED: 2 of 3 comparisons, in step, unet"


def test_summary_has_a_line_per_rung_then_the_failures_and_the_verdict():
    records = [
        Record("words", "words with published ones", 0, 0),
        Record("step", "update by torch with the float32 reference", note="same code here"),
        Record("step", "rows flagged", 0, 0),
        Record("noising", "x_t by torch", note="same code here"),
        Record("unet", "fp32 U-Net, max", 1.5e-6, 2e-6),
        Record("unet", "fp32 U-Net, rms", 1e-6, 2e-6),
    ]
    assert summary(records).splitlines() == [
        "words    pass     1 comparison",
        "step     pass     1 comparison, 1 skipped: same code here",
        "noising  skipped  same code here",
        "unet     pass     2 comparisons, errors at most 75% of their bounds",
        "passed: all 4 comparisons; 2 skipped",
    ]
    records[2] = replace(records[2], error=7)
    records[4] = replace(records[4], error=math.nan)
    assert summary(records).splitlines() == [
        "words    pass     1 comparison",
        "step     FAIL     1 of 1 comparison, 1 skipped: same code here",
        "noising  skipped  same code here",
        "unet     FAIL     1 of 2 comparisons",
        "",
        "step  rows flagged     7 differ  equal  FAIL",
        "unet  fp32 U-Net, max  nan       2e-06  FAIL",
        "FAILED: 2 of 4 comparisons, in step, unet",
    ]
