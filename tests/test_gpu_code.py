"""Every Triton kernel becomes machine code for an H100, as it would be launched; without a GPU.

The interpreter, in which other tests run the kernels, takes things that the compiler refuses.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


class Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


def compiled():
    """Call the operators on the CPU, their kernels compiled and not run; gives these by name."""
    import triton
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, {}

    def compile_only(self, *arguments, **options):
        kernels[f"{self.fn.__module__}.{self.fn.__name__}"] = run(
            self, *arguments, **(options | {"warmup": True})
        )

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    cross_entropy()
    residual()
    attention()
    return kernels


def cross_entropy():
    from dtrain.kernels.cross_entropy import cross_entropy

    for width, dtype in ((32768, torch.bfloat16), (32001, torch.float32)):
        logits, target = torch.empty(2, width, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        cross_entropy(logits, target, 0.1, 64.0, dtype == torch.bfloat16)


def residual():
    from dtrain.kernels.residual import add_and_norm

    low, norm = torch.bfloat16, torch.nn.LayerNorm(512)
    for x_dtype, p, kind in ((low, 0.1, norm), (torch.float32, 0.0, norm), (low, 0.1, None)):
        x, y = (torch.zeros(130, 512, dtype=d, requires_grad=True) for d in (x_dtype, low))
        add_and_norm(x, y, kind, p, training=True, fused=True).sum().backward()


def attention():
    from dtrain.batch import Layout
    from dtrain.kernels.attention import attend, attend_to_self

    layout = Layout.packed(np.array([30, 70]), 128, "packed")
    qkv = torch.zeros(128, 3, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    attend_to_self(qkv, layout, causal=True, dropout=0.1).sum().backward()
    attend(qkv[:, 0], qkv[:, 1:], layout, layout).sum().backward()


@pytest.mark.slow
def test_all_kernels_compile_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    command = "import test_gpu_code; print(*test_gpu_code.compiled())"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = f"{HERE}{os.pathsep}{HERE.parent}"
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = {
        f"dtrain.kernels.{path.stem}.{name}"
        for path in (HERE.parent / "dtrain" / "kernels").glob("*.py")
        for name in re.findall(r"^def (_(?:\w+_)?kernel)\(", path.read_text("utf-8"), re.MULTILINE)
    }
    assert set(done.stdout.split()) == written
