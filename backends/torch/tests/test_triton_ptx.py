# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles to PTX for the GPUs that it is meant for, on a machine that has none."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: where the interpreter is chosen, kernels cannot be compiled.
PROGRAM = """
import json, os, sys
os.environ.pop("TRITON_INTERPRET", None)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hyperep_torch import triton_kernels as kernels

FLOAT, BFLOAT, INT, LONG, SIZE = "*fp32", "*bf16", "*i32", "*i64", "i32"
SIGNATURES = {
    "_gather_rows": ((BFLOAT, LONG, BFLOAT, SIZE), {"BLOCK": 1024}),
    "_sum_rows": ((BFLOAT, LONG, FLOAT, BFLOAT, SIZE, SIZE), {"TERMS": 6, "WEIGHTED": True, "BLOCK": 1024}),
    "_sum_rows_backward": (
        (BFLOAT, BFLOAT, LONG, FLOAT, BFLOAT, FLOAT, SIZE, SIZE), {"TERMS": 6, "BLOCK": 2048}
    ),
    "_swiglu": ((BFLOAT, BFLOAT, BFLOAT, SIZE), {"BLOCK": 2048}),
    "_swiglu_backward": ((BFLOAT, BFLOAT, BFLOAT, BFLOAT, BFLOAT, SIZE), {"BLOCK": 2048}),
    "_clear_empty_groups": ((FLOAT, INT, SIZE), {"BLOCK": 2048}),
}
made = {}
for name, (types, constants) in SIGNATURES.items():
    function = getattr(kernels, name)
    # Constants have a place in the signature too.
    signature = dict(zip((n for n in function.arg_names if n not in constants), types, strict=True))
    ordered = {n: signature.get(n, "constexpr") for n in function.arg_names}
    source = ASTSource(fn=function, signature=ordered, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    made[name] = compiled.asm["ptx"].count(".entry")
kernels_there = sorted(n for n, f in vars(kernels).items() if isinstance(f, triton.runtime.JITFunction))
print(json.dumps({"made": made, "there": kernels_there}))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_to_ptx(capability):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["made"] == dict.fromkeys(found["made"], 1)
    assert sorted(found["made"]) == found["there"]
