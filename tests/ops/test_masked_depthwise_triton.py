"""The Triton kernels against the plain PyTorch form: on a GPU compiled, without one in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convmae.errors import UserError
from convmae.masking import random_visible
from convmae.ops import masked_depthwise as module
from convmae.ops import masked_depthwise_reference
from convmae.ops.masked_depthwise import masked_depthwise, masked_depthwise_dense
from convmae.packing import Packing

kernels = pytest.importorskip("convmae.ops.masked_depthwise_triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the error against float64, relative to its own norm: what rounding inputs and outputs once may cost.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def tensors(*shapes, dtype):
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_agree(form, inputs, reference=None):
    """Output and gradients of the Triton form against those of the reference in float64."""
    exact = [value.detach().double().requires_grad_() for value in inputs]
    output, wanted = form(*inputs, backend="triton"), (reference or form)(*exact, backend="reference")
    upstream = torch.randn_like(output)
    mine = [output, *torch.autograd.grad(output, inputs, upstream)]
    theirs = [wanted, *torch.autograd.grad(wanted, exact, upstream.double())]
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype is inputs[0].dtype
        assert got.shape == expected.shape
        assert (got.double() - expected).norm() <= TOLERANCE[got.dtype] * expected.norm()


def packed(packing):
    def form(x, weight, bias, backend):
        return masked_depthwise(x, weight, bias, packing, backend)

    return form


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("grid", "side", "channels", "size"),
    [((4, 5), 4, 24, 5), ((5, 3), 2, 70, 5), ((3, 3), 2, 8, 9), ((2, 3), 4, 16, 7), ((4, 4), 1, 130, 3)],
)
def test_packed_maps(grid, side, channels, size, dtype):
    packing = Packing.of(random_visible(3, grid, 0.6, device=DEVICE))
    shape = (*packing.index.shape, side, side, channels)
    assert_agree(packed(packing), tensors(shape, (channels, 1, size, size), (channels,), dtype=dtype))


def test_more_rows_than_one_program_sums():
    packing = Packing.of(random_visible(2, (8, 8), 0.25, device=DEVICE))
    shape = (*packing.index.shape, 4, 4, 5)
    assert 2 * packing.index.shape[1] * 16 > 2 * 512
    assert_agree(packed(packing), tensors(shape, (5, 1, 3, 3), (5,), dtype=torch.float32))


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_all_but_one_and_a_single_token_visible(ratio):
    packing = Packing.of(random_visible(2, (3, 3), ratio, device=DEVICE))
    shape = (*packing.index.shape, 2, 2, 6)
    assert_agree(packed(packing), tensors(shape, (6, 1, 5, 5), (6,), dtype=torch.float32))


def test_every_token_visible_is_the_dense_map():
    visible = torch.ones(2, 3, 4, dtype=torch.bool, device=DEVICE)
    packing = Packing.of(visible)

    def dense(x, weight, bias, backend):
        return packing.pack(masked_depthwise_dense(packing.unpack(x), weight, bias, backend=backend))

    assert_agree(packed(packing), tensors((2, 12, 2, 2, 6), (6, 1, 5, 5), (6,), dtype=torch.float32), dense)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "size"), [((2, 7, 9, 40), 5), ((1, 1, 1, 3), 3), ((1, 4, 5, 6), 9)])
def test_dense_maps(shape, size, dtype):
    assert_agree(masked_depthwise_dense, tensors(shape, (shape[-1], 1, size, size), (shape[-1],), dtype=dtype))


def test_inputs_need_not_be_contiguous():
    packing = Packing.of(random_visible(2, (4, 4), 0.5, device=DEVICE))
    x, weight, bias = tensors((2, 2, 2, 8, 6), (6, 1, 3, 3), (6,), dtype=torch.float32)

    def form(x, weight, bias, backend):  # (B, s, s, K, C) -> (B, K, s, s, C)
        return masked_depthwise(x.permute(0, 3, 1, 2, 4), weight, bias, packing, backend)

    assert_agree(form, [x, weight, bias])


def test_the_backend_is_what_was_asked_for(monkeypatch):
    packing = Packing.of(random_visible(2, (3, 3), 0.5, device=DEVICE))
    x, weight, bias = tensors((2, 4, 2, 2, 6), (6, 1, 3, 3), (6,), dtype=torch.float64)
    with pytest.raises(UserError, match="choose auto, reference or triton"):
        masked_depthwise(x, weight, bias, packing, "cuda")
    with pytest.raises(UserError, match=r"not torch\.float64: choose reference"):
        masked_depthwise(x, weight, bias, packing, "triton")
    torch.testing.assert_close(
        masked_depthwise(x, weight, bias, packing), masked_depthwise(x, weight, bias, packing, "reference")
    )
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    if DEVICE == "cpu":
        with pytest.raises(UserError, match="needs a GPU, the map is on cpu: choose auto or reference"):
            masked_depthwise(x.float(), weight, bias, packing, "triton")
    module._chosen.cache_clear()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        masked_depthwise(x.float(), weight, bias, packing, "triton")


def operators(packing, dtype, backend):
    """Both operators with inputs of their own."""
    shape = (*packing.index.shape, 2, 2, 6)
    x, gradient, weight, bias = tensors(shape, shape, (6, 1, 3, 3), (6,), dtype=dtype)
    maps = tensors((2, 5, 4, 6), (2, 5, 4, 6), dtype=dtype)
    places = packing.index, packing.slots
    return [
        (module._masked_depthwise, (x, weight, bias, *places, backend)),
        (module._masked_depthwise, (x, weight, None, *places, backend)),
        (module._masked_depthwise, (maps[0], weight, bias, None, None, backend)),
        (module._parameter_gradients, (x.detach(), gradient.detach(), 3, *places, backend)),
        (module._parameter_gradients, (maps[0].detach(), maps[1].detach(), 3, None, None, backend)),
    ]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_operators_keep_torchs_rules(backend):
    packing = Packing.of(random_visible(2, (3, 4), 0.5, device=DEVICE))
    for operator, arguments in operators(packing, torch.float32, backend):
        torch.library.opcheck(operator, arguments)


def test_torch_counts_the_arithmetic_of_visible_cells():
    packing = Packing.of(random_visible(2, (3, 4), 0.5, device=DEVICE))
    x, weight, bias = tensors((2, 6, 2, 2, 8), (8, 1, 3, 3), (8,), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = masked_depthwise(x, weight, bias, packing)
        assert counter.get_total_flops() == 2 * x.numel() * 9
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 9
    (maps,) = tensors((2, 5, 7, 8), dtype=torch.float32)
    counts = []
    for form in (masked_depthwise_dense, masked_depthwise_reference.convolve_dense):
        with FlopCounterMode(display=False) as counter:
            form(maps, weight, bias)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * maps.numel() * 9


def test_the_reference_against_finite_differences():
    packing = Packing.of(random_visible(2, (2, 3), 0.5, device=DEVICE))
    x, weight, bias = tensors((2, 3, 2, 2, 2), (2, 1, 3, 3), (2,), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: masked_depthwise(*inputs, packing, "reference"), (x, weight, bias))
    (maps,) = tensors((2, 3, 4, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: masked_depthwise_dense(*inputs, backend="reference"), (maps, weight, bias)
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_compiler_finds_no_graph_break(backend):
    packing = Packing.of(random_visible(2, (3, 3), 0.5, device=DEVICE))
    x, weight, bias = tensors((2, 4, 2, 2, 6), (6, 1, 3, 3), (6,), dtype=torch.float32)
    (maps,) = tensors((2, 4, 4, 6), dtype=torch.float32)

    def both(x, maps, weight, bias):
        y = masked_depthwise(x * 2, weight, bias, packing, backend)
        return y.sum() + masked_depthwise_dense(maps, weight, bias, backend=backend).square().sum()

    inputs = (x, maps, weight, bias)
    wanted = torch.autograd.grad(both(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(both, fullgraph=True)(*inputs), inputs)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convmae.ops import masked_depthwise_triton as kernels

def compiled(kernel, values, constants, warps):
    signature = {**values, **dict.fromkeys(constants, "constexpr")}
    # As at a call with aligned maps and channels in multiples of 16.
    aligned = [name for name, kind in values.items() if kind.startswith("*") or name in ("rows", "channels")]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps})

places = dict(index="*i64", slots="*i32")
numbers = dict.fromkeys(("tokens", "height", "width", "rows", "channels"), "i32")
for kind in ("fp32", "bf16"):
    for size, side, packed in ((5, 4, True), (9, 2, True), (5, 1, False)):
        shared = dict(SIZE=size, SIDE=side, PACKED=packed)
        where = places if packed else dict.fromkeys(places, f"*{kind}")
        first = {**dict.fromkeys(("x", "taps", "bias", "y"), f"*{kind}"), **where, **numbers}
        second = {"x": f"*{kind}", "gradient": f"*{kind}", "sums": "*fp32", **where, **numbers}
        parts = dict(TAPS=triton.next_power_of_2(size), PART_ROWS=kernels._PART_ROWS)
        for tuned, values, constants in (
            (kernels._convolve, first, dict(**shared, BIAS=True)),
            (kernels._parameter_gradients, second, dict(**shared, **parts)),
        ):
            # Each of the blocks to choose from in the case that pretraining has most of.
            for config in tuned.configs[: None if (kind, side) == ("bf16", 4) else 1]:
                kernel = compiled(tuned.fn, values, {**constants, **config.kwargs}, config.num_warps)
                print(len(kernel.asm["cubin"]))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path):
    script = tmp_path / "compile.py"  # Triton reads the source of what it compiles
    script.write_text(_COMPILE.replace("CAPABILITY", str(capability)))
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, script], env=settings, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    sizes = [int(size) for size in run.stdout.split()]
    assert len(sizes) == 5 * 2 + 2 * 6
    assert all(1000 < size < 200_000 for size in sizes)  # a loop over taps that were unrolled made a megabyte
