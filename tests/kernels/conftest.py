"""Where Triton kernels run: interpreted on the CPU, or compiled on a GPU."""

import os

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A device whose tensors this process's Triton takes: an interpreter takes the CPU's, the compiler a GPU's."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU: TRITON_INTERPRET=1 would run its kernels on the CPU")
    return request.param
