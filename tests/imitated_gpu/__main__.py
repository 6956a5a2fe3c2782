"""See the package's docstring."""

import os
import runpy
import sys

from runs import environment
from tests import imitated_gpu

if len(sys.argv) < 2:
    raise SystemExit(imitated_gpu.__doc__)
memory = int(float(os.environ.get("IMITATED_GPU_BYTES", "16e9")))
imitated_gpu.start(imitated_gpu.build(), memory, int(float(os.environ.get("IMITATED_GPU_LEFT", memory))))
# a GPU's 0.7 TFLOP to learn its rate are ten seconds here, for a forecast alone
environment.matmul_rate = lambda device, dtype, measured=environment.matmul_rate: measured("cpu", dtype)
if sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
