#!/usr/bin/env bash
# fbgemm-gpu-cpu 1.8.0: row-wise quantization repairs NaN, spreads infinity, and to 4 bits turns large rows into
# NaN.
#
# Expected: quantization is lossy within half a step of the row's range. A value that is not finite stays
# visible, and finite values stay finite.
#
# Seen: in 8 bits (FloatToFused8BitRowwiseQuantized) NaN becomes the row's minimum, so a diverged table loads
# healthy. One infinite value turns the whole row into NaN. In 4 bits (FloatToFusedNBitRowwiseQuantizedSBHalf)
# the scale and the offset are float16: a row with values of 70,000 to 80,000 becomes NaN, and a row of 1e-8 to
# 8e-8 becomes 0.
#
# Hurt: an offline evaluation of the float32 model gives NaN, but the exported int8 model serves plausible
# scores. A check for NaN after the export finds nothing. Workaround: check for finite values before
# quantization.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 fbgemm-gpu-cpu==1.8.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import importlib.metadata
import sys
import torch
import fbgemm_gpu  # noqa: F401  (registers the operators)

print("fbgemm-gpu-cpu", importlib.metadata.version("fbgemm-gpu-cpu"))
fbgemm = torch.ops.fbgemm
nan, inf = float("nan"), float("inf")


def int8(row: list[float]) -> torch.Tensor:
    return fbgemm.Fused8BitRowwiseQuantizedToFloat(fbgemm.FloatToFused8BitRowwiseQuantized(torch.tensor([row])))[0]


def int4(row: torch.Tensor) -> torch.Tensor:
    return fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(row[None], 4), 4)[0]


with_nan, with_inf = int8([0.01, nan, 0.02, 0.03]), int8([inf, 0.01, 0.02, 0.03])
large, small = int4(torch.linspace(7e4, 8e4, 8)), int4(torch.linspace(1e-8, 8e-8, 8))
print("int8, 0.01 NaN 0.02 0.03:  expected a NaN,      seen", with_nan.tolist())
print("int8, Inf 0.01 0.02 0.03:  expected one Inf,    seen", with_inf.tolist())
print("int4, 70,000 to 80,000:    expected finite,     seen", large.tolist())
print("int4, 1e-8 to 8e-8:        expected 8 values, seen", small.tolist())
sys.exit(not (abs(with_nan[1] - 0.01) < 1e-6 and with_inf.isnan().all() and large.isnan().all() and not small.any()))
PYTHON
