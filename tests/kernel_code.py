"""Compiles each kernel to the machine code of a GPU that need not be there, and prints how often it loads and stores.

python tests/kernel_code.py [compute capability, 75]
"""

import json
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tmlcourse import kernels
from tmlcourse.kernels import dispatch
from tmlcourse.threat import L1, L2, Linf

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def compiled(kernel, arguments, options, capability):
    """What Triton makes of a kernel for these arguments, all tensors aligned as PyTorch's allocator aligns them."""
    jit, signature, constants, hints = kernel.compiled, {}, {}, {}
    compile_with = {key: options.pop(key) for key in ("num_warps", "enable_fp_fusion")}
    for i, (parameter, value) in enumerate(zip(jit.params, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name], hints[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        elif value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i64" if value >= 2**31 else "i32"
            hints |= {(i,): [["tt.divisibility", 16]]} if value % 16 == 0 else {}
    source = ASTSource(jit, signature | dict.fromkeys(options, "constexpr"), constants | options, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compile_with)


def main(capability=75):
    found = {}

    def getitem(kernel, grid):
        def launch(*arguments, **options):
            code = compiled(kernel, arguments, options, capability)
            ptx = code.asm["ptx"]
            found[kernel.__name__] = {
                "loads": len(re.findall(r"\bld\.global", ptx)),
                "stores": len(re.findall(r"\bst\.global", ptx)),
                "wide": len(re.findall(r"\b(?:ld|st)\.global[.\w]*\.v4", ptx)),
                "machine code": len(code.asm["cubin"]),
            }

        return launch

    dispatch.Lazy.__getitem__, dispatch.interpreting = getitem, lambda: True
    x = torch.rand(4, 1, 32, 32)
    with kernels.using("triton"):
        for threat in (Linf(0.1), L2(0.7), L1(3.0)):
            kernels.ascent_step(x, x, x, threat, 0.1)
        kernels.clip_and_sum(torch.rand(64, 3200), 1.0)
        weight, centre = torch.rand(100, 784, requires_grad=True), torch.rand(64, 784)
        torch.cat(kernels.interval_linear(weight, torch.zeros(100), centre, centre)).sum().backward()
        kernels.relu_backsubstitution(torch.rand(8, 512), *torch.rand(3, 4, 512), torch.zeros(8, dtype=torch.int64))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
