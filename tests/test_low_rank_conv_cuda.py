"""The CUDA kernel of the low-rank convolution: its values in the emulation, its machine code where nvcc is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_rel
from emulated_cuda import CSRC, Device, Emulator, Sizes
from sass import Binary, compile_cuda, cuobjdump
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# float32 goes through the tensor cores as TF32, which has the significand of float16.
PRECISION = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float32: torch.float16}


@dataclass(frozen=True)
class Case:
    """A call of the kernel; ``pad`` is before the image, ``cut`` of it is missing behind."""

    dtype: torch.dtype = torch.bfloat16
    spatial: bool = False
    batch: int = 1
    in_channels: int = 16
    rank: int = 16
    out_channels: int = 16
    image: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (1, 1)
    pad_after: tuple[int, int] | None = None  # None: as before
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    residual: bool = False
    relu: bool = False
    with_z: bool = True
    device: Device = Device()

    def __str__(self) -> str:
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return " ".join(f"{name}={given[name]}" for name in given if given[name] != getattr(Case, name)) or "default"

    @property
    def output_size(self) -> list[int]:
        after = self.pad if self.pad_after is None else self.pad_after
        return [
            (size + pad + more - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, more, dilation, kernel, stride in zip(
                self.image, self.pad, after, self.dilation, self.kernel, self.stride, strict=True
            )
        ]

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            self.batch, 1, self.in_channels, self.rank, self.out_channels, *self.image, *self.output_size,
            *self.kernel, *self.stride, *self.pad, *self.dilation, self.spatial,
        )  # fmt: skip


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def run(
    emulator: Emulator, case: Case, reverse: bool = False, integers: bool = False, infinite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and z of the kernel, and what they should be in float64; without z the output takes its place."""
    torch.manual_seed(0)

    def random(*size: int) -> Tensor:
        return (torch.randint(-1, 2, size) if integers else torch.randn(size)).to(case.dtype)

    def blank(*size: int) -> Tensor:
        return channels_last(torch.full(size, torch.nan, dtype=case.dtype))

    (kernel_h, kernel_w), (out_h, out_w) = case.kernel, case.output_size
    output_size = (case.batch, case.out_channels, out_h, out_w)
    x = channels_last(random(case.batch, case.in_channels, *case.image))
    v = random(case.rank, case.in_channels, kernel_h, 1 if case.spatial else kernel_w)
    u = random(case.out_channels, case.rank, 1, kernel_w if case.spatial else 1)
    if not integers:
        v, u = (factor / factor[0].numel() ** 0.5 for factor in (v, u))
    if infinite:
        x[0, 0, 0, 0] = torch.inf
        v, u = v.abs(), u.abs()
    bias = random(case.out_channels) if case.bias else None
    residual = channels_last(random(*output_size)) if case.residual else None
    output = blank(*output_size)
    z = blank(case.batch, case.rank, out_h, case.image[1] if case.spatial else out_w) if case.with_z else None
    emulator.low_rank_conv(
        case.sizes, x, emulator.pack(case.sizes, v, u), bias, residual, case.relu, output, z, case.device, reverse
    )

    x, v, u = x.double(), v.double(), u.double()
    (pad_h, pad_w), (stride_h, stride_w), (dilation_h, dilation_w) = case.pad, case.stride, case.dilation
    far = 2 * max(*case.kernel, *case.dilation, *case.stride, *case.pad) * max(case.kernel)
    if case.spatial:
        expected_z = F.conv2d(F.pad(x, (0, 0, pad_h, far)), v, stride=(stride_h, 1), dilation=(dilation_h, 1))
        expected_z = expected_z[:, :, :out_h]
        expected = F.conv2d(F.pad(expected_z, (pad_w, far)), u, stride=(1, stride_w), dilation=(1, dilation_w))
    else:
        expected_z = F.conv2d(F.pad(x, (pad_w, far, pad_h, far)), v, stride=case.stride, dilation=case.dilation)
        expected_z = expected_z[:, :, :out_h, :out_w]
        expected = F.conv2d(expected_z, u)
    expected = expected[:, :, :, :out_w]
    if bias is not None:
        expected = expected + bias.double()[:, None, None]
    if residual is not None:
        expected = expected + residual
    return output, output if z is None else z, expected.relu() if case.relu else expected, expected_z


CHANNEL = [
    Case(),
    Case(rank=1, in_channels=8, out_channels=1, bias=False),
    Case(rank=17, in_channels=40, out_channels=30, batch=3, residual=True, relu=True),
    Case(rank=50, in_channels=40, out_channels=68, image=(8, 9), batch=3, relu=True, device=Device(132)),
    Case(rank=128, in_channels=24, out_channels=40, image=(4, 4), batch=5, residual=True, device=Device(132)),
    Case(rank=40, in_channels=72, out_channels=70, image=(7, 7), batch=2),
    Case(rank=64, in_channels=32, out_channels=64, image=(8, 9), bias=False, relu=True),
    Case(rank=128, in_channels=24, out_channels=136, image=(4, 4), batch=9, residual=True),
    Case(rank=100, in_channels=8, kernel=(1, 1), pad=(0, 0), with_z=False),
    Case(kernel=(1, 1), pad=(0, 0), in_channels=200, image=(2, 3), batch=5),  # every item is a slice
    Case(kernel=(2, 1), pad=(0, 0), in_channels=168),
    Case(kernel=(5, 5), pad=(2, 2), rank=48, image=(9, 8)),
    Case(kernel=(7, 7), pad=(3, 3), rank=128, image=(6, 7), batch=2),
    Case(stride=(2, 2), image=(11, 14), batch=2),
    Case(stride=(1, 3), image=(6, 12), pad=(2, 0)),
    Case(stride=(3, 2), kernel=(2, 2), pad=(0, 0), image=(9, 9)),  # some pixels are not read
    Case(dilation=(2, 3), pad=(2, 3), image=(8, 10), residual=True),
    Case(dilation=(4, 1), pad=(0, 1), image=(13, 6)),
    Case(pad=(5, 6), image=(3, 2)),  # whole tiles of padding
    Case(pad=(2, 0), pad_after=(0, 3)),
    Case(pad=(0, 0), pad_after=(4, 1), stride=(2, 1)),
    Case(image=(1, 300)),
    Case(image=(37, 3), kernel=(3, 1), pad=(1, 0)),
    Case(image=(20, 19), batch=2, relu=True),
    Case(in_channels=64, rank=32, image=(12, 16), device=Device(132, 99 << 10)),
    Case(rank=128, kernel=(7, 7), pad=(3, 3), dilation=(2, 2), image=(13, 14), device=Device(shared_limit=163 << 10)),
]
SPATIAL = [
    *(replace(case, spatial=True) for case in CHANNEL),
    Case(spatial=True, image=(3, 140), with_z=False),
    Case(spatial=True, image=(2, 140), kernel=(3, 5), stride=(1, 2), pad=(1, 2)),  # tiles share columns of z
    Case(spatial=True, image=(4, 8), kernel=(1, 3), stride=(1, 2), pad=(0, 0)),  # no tap reads the last column of z
    Case(spatial=True, image=(3, 9), kernel=(3, 1), stride=(1, 4), pad=(1, 0)),
    Case(spatial=True, image=(3, 150), kernel=(3, 1), stride=(1, 4), pad=(1, 0), with_z=False),
]
CASES = [
    *(replace(case, dtype=dtype) for dtype in (torch.bfloat16, torch.float32) for case in [*CHANNEL, *SPATIAL]),
    *(replace(case, dtype=torch.float16) for case in [*CHANNEL[:6], *SPATIAL[:6]]),  # bfloat16 but for two conversions
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, emulator: Emulator) -> None:
    output, z, expected, expected_z = run(emulator, case, reverse=CASES.index(case) % 2 == 1)
    assert_close_rel(output, expected, PRECISION[case.dtype])
    if case.with_z:
        assert_close_rel(z, expected_z, PRECISION[case.dtype])


@pytest.mark.parametrize("case", [CHANNEL[2], CHANNEL[5], SPATIAL[2], SPATIAL[5]], ids=str)
def test_the_order_of_the_threads_does_not_matter(case: Case, emulator: Emulator) -> None:
    first, last = (run(emulator, case, reverse) for reverse in (False, True))
    assert torch.equal(first[0], last[0]) and torch.equal(first[1], last[1])


@pytest.mark.parametrize("spatial", [False, True])
def test_small_integers_are_exact(spatial: bool, emulator: Emulator) -> None:
    """In every dtype: what is rounded is representable."""
    case = Case(spatial=spatial, in_channels=40, rank=17, out_channels=36, image=(6, 9), residual=True)
    results = [run(emulator, replace(case, dtype=dtype), integers=True) for dtype in DTYPES]
    for output, z, expected, expected_z in results:
        assert torch.equal(output.double(), expected) and torch.equal(z.double(), expected_z)


@pytest.mark.parametrize("spatial", [False, True])
def test_infinities_stay_infinities(spatial: bool, emulator: Emulator) -> None:
    case = Case(spatial=spatial, rank=17, out_channels=20)
    output, z, expected, expected_z = run(emulator, case, infinite=True)
    assert expected_z.isinf().any() and not expected_z.isnan().any()
    assert_close_rel(z, expected_z, case.dtype)
    assert_close_rel(output, expected, case.dtype)


def test_what_the_kernel_does_not_take(emulator: Emulator) -> None:
    case = Case()

    def taken(case: Case, **sizes: int) -> bool:
        return bool(emulator.plan(replace(case.sizes, **sizes), case.dtype, case.with_z, case.device))

    assert taken(case)
    assert not taken(replace(case, dtype=torch.float64))
    assert not taken(replace(case, rank=129)) and not taken(case, rank=0)
    assert not taken(replace(case, in_channels=12)) and taken(replace(case, in_channels=12, dtype=torch.float32))
    assert not taken(case, groups=2) and not taken(case, batch=0)
    assert not taken(replace(case, device=Device(1, 1 << 10)))
    assert not taken(replace(case, kernel=(200, 200), pad=(100, 100)))  # no tile's halo fits
    assert not taken(replace(case, pad=(2**31, 1))) and not taken(case, pad_h=-1)
    assert not taken(replace(case, spatial=True, kernel=(1, 129), image=(1, 200), pad=(0, 0)))  # z of a pixel does not
    assert not taken(replace(case, spatial=True, kernel=(1, 5000), pad=(0, 2500)))
    uncovered = replace(case, spatial=True, kernel=(3, 1), stride=(1, 4), image=(3, 150))
    assert not taken(uncovered) and taken(replace(uncovered, with_z=False))
    assert not taken(case, height=2**15, width=2**15, in_channels=64)  # 16-byte offsets in 32 bits
    assert taken(case, batch=2**26) and not taken(case, batch=2**27)  # pixels of the output in 32 bits


def test_tiles_fill_the_tensor_cores_and_leave_room_for_other_blocks(emulator: Emulator) -> None:
    for spatial in (False, True):
        for channels, side, rank in ((64, 32, 16), (64, 56, 16), (128, 16, 32), (256, 8, 64), (512, 4, 128)):
            case = Case(spatial=spatial, batch=128, in_channels=channels, rank=rank, image=(side, side))
            *_, blocks, shared_bytes = emulator.plan(case.sizes, case.dtype, True, Device())
            assert 128 * side * side >= 0.85 * 128 * blocks
            assert (3 if rank <= 64 else 2) * (shared_bytes + 1024) <= 228 << 10
            *_, smaller, _ = emulator.plan(case.sizes, case.dtype, True, Device(132))
            assert smaller == (2 * blocks if blocks < 132 else blocks)


@dataclass(frozen=True)
class Kernel:
    """An instantiation, for one kind of GPU."""

    dtype: str
    rank: int
    scheme: str
    arch: int
    warp_tiles: int = 2

    @property
    def arguments(self) -> str:
        return f"Dtype::{self.dtype}, {self.rank // 16}, {str(self.scheme == 'spatial').lower()}, {self.warp_tiles}"

    @property
    def mangled(self) -> str:
        number = DTYPES_OF_THE_LIBRARY[self.dtype]
        return f"DtypeE{number}ELi{self.rank // 16}ELb{int(self.scheme == 'spatial')}ELi{self.warp_tiles}E"


LARGEST = [Kernel(dtype, 128, "channel", arch) for arch in (80, 90, 100) for dtype in ("kBFloat16", "kFloat32")]
KERNELS = [
    *LARGEST,
    *(Kernel(*kernel, 90) for kernel in [("kBFloat16", 128, "spatial"), ("kFloat16", 64, "channel")]),
    *(Kernel(*kernel, 90, 1) for kernel in [("kFloat32", 64, "spatial"), ("kBFloat16", 16, "channel")]),
]
DTYPES_OF_THE_LIBRARY = {"kFloat32": 0, "kBFloat16": 2, "kFloat16": 3}
PRODUCTS = {
    "kBFloat16": "HMMA.16816.F32.BF16",
    "kFloat16": "HMMA.16816.F32",
    "kFloat32": "HMMA.1688.F32.TF32",
}


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[Kernel, Binary]:
    """The machine code of ``KERNELS``."""
    if shutil.which("nvcc") is None or cuobjdump() is None:
        pytest.skip("nvcc or cuobjdump is not installed")
    found = {}
    for arch in sorted({kernel.arch for kernel in KERNELS}):
        kernels = [kernel for kernel in KERNELS if kernel.arch == arch]
        lines = [f'#include "{CSRC / "low_rank_conv_kernel.cuh"}"', "using namespace smoothk;"]
        for kernel in kernels:
            function = f"smoothk::cuda::low_rank_conv_kernel<{kernel.arguments}>"
            lines.append(f"template __global__ void {function}(const __grid_constant__ cuda::LowRankConvLaunch);")
        compiled = compile_cuda("\n".join(lines), arch, tmp_path_factory.mktemp("cubin"))
        for kernel in kernels:
            (found[kernel],) = (binary for name, binary in compiled.items() if kernel.mangled in name)
    return found


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_machine_code(kernel: Kernel, binaries: dict[Kernel, Binary]) -> None:
    binary = binaries[kernel]
    opcodes = [instruction.opcode for instruction in binary.instructions]
    assert binary.spills == binary.local_bytes == 0
    assert binary.registers * 128 * 2 <= 65536  # two blocks an SM
    # Tensor cores, fed by asynchronous copies of 16 bytes and by loads of four matrices or 16 bytes a lane.
    assert {opcode for opcode in opcodes if "MMA" in opcode} == {PRODUCTS[kernel.dtype]}
    copies = {opcode for opcode in opcodes if opcode.startswith("LDGSTS")}
    assert copies and all(copy.startswith("LDGSTS.E.BYPASS.LTC128B.128") for copy in copies)
    assert {opcode for opcode in opcodes if opcode.startswith("LDSM")} == {"LDSM.16.M88.4"}
    assert opcodes.count("LDS.128") >= 2 * kernel.rank // 16


def test_the_products_wait_for_nothing_but_their_operands(binaries: dict[Kernel, Binary]) -> None:
    """A tap of the first product: 16 * 2 * 2 instructions of the tensor cores and no branch between them."""
    for kernel in LARGEST:
        opcodes = [instruction.opcode for instruction in binaries[kernel].instructions]
        runs = "".join("m" if "HMMA" in each else "|" if each.startswith(("BRA", "BAR")) else "" for each in opcodes)
        assert max(map(len, runs.split("|"))) >= 2 * 2 * kernel.rank // 8
