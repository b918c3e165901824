"""Test Triton without a GPU: the kernels under the interpreter, and the cost of each compiled kernel on a GPU."""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BEHAVIOUR = sorted(str(path) for path in Path(__file__).parent.glob("test_triton_*.py"))
THREADS, REGISTERS = 512, 65_536  # threads of one program; registers of an SM

pytest.importorskip("triton")
compiled_only = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@compiled_only
def test_kernels_behave_under_the_interpreter(record_property):
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *BEHAVIOUR]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    record_property("measured", f"under the interpreter: {done.stdout.splitlines()[-1]}")


# Variants of the row kernel: dtypes of logits, bias and gradient, optional vectors, and switches.
OBJECTIVE = "advantages_L weights_L old_L sampler_L ref_L"
ROW_VARIANTS = {
    "log-prob": ("fp32", None, None, "", {}),
    "log-prob of bf16 logits, kept": ("bf16", None, None, "index_L temperature_L top_L log_sum_L", {}),
    "token loss": ("fp32", None, "bf16", "advantages_L weights_L old_L", {}),
    "token loss of bf16 logits": ("bf16", None, "bf16", f"index_L {OBJECTIVE}", {"KL": 3, "ENTROPY": True}),
    "token loss, everything": ("fp32", "bf16", "bf16", f"temperature_L {OBJECTIVE}", {"KL": 3, "ENTROPY": True}),
    "shared ratio with KL": ("fp32", None, "bf16", f"by_logprob_L {OBJECTIVE}", {"KL": 3}),
    "float32 loss": ("fp32", "fp32", "fp32", OBJECTIVE, {"KL": 2, "ENTROPY": True}),
    "backward of bf16 logits": (
        *("bf16", None, "bf16"),
        "index_L top_L log_sum_L by_logprob_L by_entropy_L",
        {"KNOWN": True, "ENTROPY": True},
    ),
    "log-prob over a shard": ("fp32", "bf16", None, "temperature_L top_L log_sum_L", {}),
    "log-prob of capped logits": ("fp32", None, None, "", {"CAP": True}),
    "token loss of capped logits, everything": (
        *("fp32", "bf16", "bf16"),
        f"temperature_L {OBJECTIVE}",
        {"KL": 3, "ENTROPY": True, "CAP": True},
    ),
    "backward of capped bf16 logits": (
        *("bf16", None, "bf16"),
        "index_L top_L log_sum_L by_logprob_L by_entropy_L",
        {"KNOWN": True, "ENTROPY": True, "CAP": True},
    ),
    "token loss over a shard": (
        *("fp32", "bf16", "bf16"),
        f"temperature_L top_L log_sum_L {OBJECTIVE}",
        {"KNOWN": True, "KL": 3, "ENTROPY": True},
    ),
}
SCALARS = ("temperature", "log_low", "log_high", "log_dual", "sampler_cap", "kl_coef", "entropy_coef", "softcap")


def row_source(logits, bias, gradient, optional, switches, block):
    """Return the row kernel with these arguments; buffers and sizes are multiples of 16 as in real calls."""
    from mgrpo.kernels.triton.rows import row_kernel

    types = {"logits_CV": f"*{logits}", "row_stride": "i64", "targets_L": "*i64", "start": "i32", "vocabulary": "i32"}
    types |= {"logprobs_L": "*fp32", "entropy_L": "*fp32", **dict.fromkeys(SCALARS, "fp32")}
    types |= {name: "*i64" if name == "index_L" else "*fp32" for name in optional.split()}
    if bias:
        types["bias_V"] = f"*{bias}"
    if gradient:
        types |= {"gradient_CV": f"*{gradient}", "gradient_row_stride": "i64"}
    constants = {"KNOWN": False, "KL": 0, "ENTROPY": False, "CAP": False, "BLOCK": block, **switches}
    for name in row_kernel.arg_names:
        if name not in types:
            constants.setdefault(name, 1 if "stride" in name else None)
    even = {"logits_CV", "gradient_CV", "row_stride", "gradient_row_stride", "vocabulary"}
    return source(row_kernel, types, constants, even & types.keys())


def group_source(weighted, leave_one_out, to_tokens, tile):
    """Return the group kernel for float32 rewards."""
    from mgrpo.kernels.triton.advantages import group_kernel

    outputs = {"values_R": "*fp32", "mean_G": "*fp32", "std_G": "*fp32", "zero_std_G": "*u8", "problems": "*i32"}
    types = {"rewards_R": "*fp32", "offsets_G1": "*i64", **outputs, "groups": "i32", "rows": "i32", "eps": "fp32"}
    types |= {"tokens": "i32"}
    constants = {"LEAVE_ONE_OUT": leave_one_out, "SCALED": True, "GROUPS": tile[0], "WIDTH": tile[1]}
    optional = {"weights_R": ("*fp32", weighted), "bounds_R1": ("*i64", to_tokens), "tokens_T": ("*fp32", to_tokens)}
    for name, (kind, given) in optional.items():
        (types if given else constants)[name] = kind if given else None
    return source(group_kernel, types, constants, {name for name in types if types[name].startswith("*")})


ROW_VECTORS = ("temperature", "advantages", "weights", "old", "sampler", "ref")


def vector_sources():
    """Return the kernels of the rows' vectors by name, each with all it can do, and the warps of each."""
    from mgrpo.kernels.triton import scale, vectors

    of_rows = {f"{name}_{rows}": "*fp32" for name in ROW_VECTORS for rows in "NL"}
    types = of_rows | {f"{name}_{rows}": "*i64" for name in ("targets", "segment") for rows in "NL"}
    types |= dict.fromkeys(("logprobs_N", "entropy_N", "logprobs_L", "entropy_L", "log_ratio_L"), "*fp32")
    types |= dict.fromkeys(("index_L", "rest_D", "bounds_S1"), "*i64") | {"live_N": "*u8", "found_2": "*i32"}
    types |= dict.fromkeys(("loss", "metrics_M", "by_logprob_L", "by_entropy_L", "factor"), "*fp32")
    types |= dict.fromkeys(("count", "sequences", "vocabulary"), "i32") | dict.fromkeys(SCALARS, "fp32")
    types |= {"values_X": "*bf16"}
    constants = {"EVERY": False, "SHARED": True, "KL": 3, "PENALTY": True, "ENTROPY": True, "CAPPED": True}
    kernels = {
        vectors.check_kernel: (vectors.BLOCK, vectors.WARPS),
        vectors.pick_kernel: (vectors.BLOCK, vectors.WARPS),
        vectors.sums_kernel: (vectors.SUMS_BLOCK, vectors.SUMS_WARPS),
        scale.scale_kernel: (scale.BLOCK, scale.WARPS),
    }
    for kernel, (block, warps) in kernels.items():
        switches = {**constants, "BLOCK": block, "EACH": scale.EACH}
        mine = {name: types[name] for name in kernel.arg_names if name in types}
        fixed = {name: switches[name] for name in kernel.arg_names if name in switches}
        yield (
            kernel.__name__,
            source(kernel, mine, fixed, {"values_X", "count"} & mine.keys() if "values_X" in mine else set()),
            warps,
        )


def source(kernel, types, constants, even):
    """Return what triton compiles: a kernel, the types or values of its arguments, and which are multiples of 16."""
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    return ASTSource(
        kernel, signature, constants, {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    )


def compiled(source, capability, warps):
    """Compile; return the kernel, its registers per thread, spilled bytes (stack and local) and shared bytes."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert usage, text
    registers, stack, local = map(int, usage.groups())
    return kernel, registers, stack + local, kernel.metadata.shared


def cost(name, capability, registers, spilled, shared):
    return f"sm_{capability} {name}: {registers} registers a thread, {spilled} B spilled, {shared} B shared"


@compiled_only
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_row_kernel_spills_nothing_and_two_programs_fit_on_an_sm(capability, record_property):
    from mgrpo.kernels.triton.rows import launch_settings

    for (name, variant), alone in itertools.product(ROW_VARIANTS.items(), [False, True]):
        if alone and not (variant[2] and not variant[-1].get("KNOWN")):
            continue  # only rows that are read twice
        block, warps = launch_settings(151_936, alone=alone)
        assert warps * 32 == THREADS * (2 if alone else 1)
        _, registers, spilled, shared = compiled(row_source(*variant, block), capability, warps)
        record_property("measured", cost(f"row kernel, {name}, {warps} warps", capability, registers, spilled, shared))
        assert spilled == 0
        assert registers * THREADS * 2 <= REGISTERS
        assert shared < 1024


@compiled_only
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_group_kernel_spills_nothing(capability, record_property):
    from mgrpo.kernels.triton.advantages import FEW_ROWS_TILE, MANY_ROWS_TILE

    options = ([FEW_ROWS_TILE, MANY_ROWS_TILE], [False, True], [False, True], [False, True])
    for tile, *switches in itertools.product(*options):
        _, registers, spilled, shared = compiled(group_source(*switches, tile), capability, tile[-1])
        given = [name for name, on in zip(("weights", "leave one out", "tokens"), switches, strict=True) if on]
        name = ", ".join(["group kernel", f"tile {tile}", *given])
        record_property("measured", cost(name, capability, registers, spilled, shared))
        assert spilled == 0 and registers <= 128


@compiled_only
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_of_vectors_spill_nothing(capability, record_property):
    for name, made, warps in vector_sources():
        kernel, registers, spilled, shared = compiled(made, capability, warps)
        record_property("measured", cost(name, capability, registers, spilled, shared))
        assert spilled == 0 and registers <= 160  # a program of sums has an SM for itself
        if name == "scale_kernel":
            assert kernel.asm["ptx"].count("ld.global.v4.b32") == kernel.asm["ptx"].count("st.global.v4.b32") == 1


@pytest.mark.parametrize(
    ("chip", "processors", "cache_mib", "longest"),
    [("A100", 108, 40, 72_000), ("H100 or H200", 132, 50, 74_000), ("B200", 148, 126, 167_000)],
)
def test_rows_that_are_read_twice_stay_in_the_cache(chip, processors, cache_mib, longest):
    """Give the longest bf16 row of which two an SM stay in the L2 cache; of longer ones each SM has one at a time."""
    from mgrpo.kernels.triton.rows import rows_stay_cached

    assert rows_stay_cached(2 * longest, processors, cache_mib << 20), chip
    assert not rows_stay_cached(2 * longest + 4000, processors, cache_mib << 20), chip
    if longest < 151_936:  # then one an SM does: Qwen3's rows are half as many bytes as the cache of an H100 is large
        assert processors * 2 * 151_936 < cache_mib << 20


@compiled_only
def test_logits_move_128_bits_at_a_time_and_cost_one_exponential_each():
    from mgrpo.kernels.triton.rows import launch_settings

    block, warps = launch_settings(151_936)
    per_thread = block // (32 * warps)
    ptx = compiled(row_source(*ROW_VARIANTS["log-prob"], block), 90, warps)[0].asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2 * per_thread // 4  # the first block, and the others in the loop
    assert len(re.findall(r"ex2\.approx", ptx)) == 2 * per_thread  # in the loop, and where the lanes are combined
    ptx = compiled(row_source(*ROW_VARIANTS["token loss"], block), 90, warps)[0].asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 4 * per_thread // 4 and ptx.count("st.global.v4.b32") == per_thread // 8
    # bf16 logits: two blocks ahead of the loop and one in it, in each of two passes; one store of their gradient.
    ptx = compiled(row_source(*ROW_VARIANTS["token loss of bf16 logits"], block), 90, warps)[0].asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2 * 3 * per_thread // 8 and ptx.count("st.global.v4.b32") == per_thread // 8


@compiled_only
def test_nothing_that_changes_from_batch_to_batch_is_compiled_in():
    """Check the arguments: constant lengths or temperatures would need a compilation per batch, and an autotuned kernel
    runs several times, so it could not write in place.
    """
    from triton.runtime import JITFunction

    from mgrpo.kernels.triton.advantages import group_kernel
    from mgrpo.kernels.triton.rows import row_kernel
    from mgrpo.kernels.triton.scale import scale_kernel
    from mgrpo.kernels.triton.vectors import check_kernel, pick_kernel, sums_kernel

    kernels = {
        row_kernel: ({"KNOWN", "KL", "ENTROPY", "CAP", "BLOCK"}, {"start"}),
        group_kernel: ({"LEAVE_ONE_OUT", "SCALED", "GROUPS", "WIDTH"}, {"groups", "rows", "tokens"}),
        check_kernel: ({"EVERY", "SHARED", "BLOCK"}, {"count", "sequences", "vocabulary"}),
        pick_kernel: ({"BLOCK"}, {"count"}),
        sums_kernel: ({"KL", "PENALTY", "ENTROPY", "CAPPED", "BLOCK"}, {"count"}),
        scale_kernel: ({"EACH", "BLOCK"}, set()),  # a count of 16s, as in all real gradients, moves 16 bytes at a time
    }
    for kernel, (constants, lengths) in kernels.items():
        assert isinstance(kernel, JITFunction)
        assert {p.name for p in kernel.params if p.is_constexpr} == constants
        assert {p.name for p in kernel.params if p.do_not_specialize} == lengths


@compiled_only
@pytest.mark.parametrize("vocabulary", [1, 7, 100, 4096, 49_152, 151_936, 2**20])
def test_launch_settings_fit_any_vocabulary(vocabulary):
    from mgrpo.kernels.triton.rows import launch_settings

    block, warps = launch_settings(vocabulary)
    assert block & (block - 1) == warps & (warps - 1) == 0 and 1 <= warps <= 16
    assert block >= min(vocabulary, 4096) and block // (32 * warps) <= 8


@pytest.mark.parametrize(
    ("total", "size", "lengths"),
    [
        (8192, 1104, [1024] * 8),
        (1030, 1104, [640, 390]),  # not 1024 and 6: those 6 rows would cost another pass over the weights
        (6000, 1104, [1024] * 5 + [880]),
        (640, 276, [256, 256, 128]),
        (20, 7, [7, 7, 6]),
        (5, 0, [1] * 5),
        (0, 7, []),
    ],
)
def test_chunks_are_whole_tiles_of_a_matmul(total, size, lengths):
    from mgrpo.kernels.triton.buffers import tiled_slices

    slices = list(tiled_slices(total, size))
    assert [s.stop - s.start for s in slices] == lengths
    assert [row for s in slices for row in range(s.start, s.stop)] == list(range(total))


def test_the_largest_shape_can_stay_below_three_gigabytes():
    """Add up bf16, N = 8192, H = 4096, V = 151936: dW in float32, dX, logits in float32 and their gradient."""
    from mgrpo.kernels.triton.buffers import LEAST_BYTES, buffer_rows, tiled_slices, whole_tiles

    rows, width, vocabulary = 8192, 4096, 151_936
    room = buffer_rows(LEAST_BYTES, vocabulary, 2)
    chunk = max(s.stop - s.start for s in tiled_slices(rows, room.chunk))
    block = whole_tiles(min(chunk, room.block))
    assert (chunk, block) == (768, 256)
    assert 4 * vocabulary * width + 2 * rows * width + 4 * block * vocabulary + 2 * chunk * vocabulary < 2.96e9


@compiled_only
def test_importing_the_kernels_does_not_import_triton():
    code = "import sys, torch, mgrpo.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plain_tensors_take_the_plain_path():
    code = (
        "import sys, torch, mgrpo.kernels as k; k.token_logprob(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64));"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
