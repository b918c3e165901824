"""Fuzz the binding with the calls of tests/fuzz/fuzz_inputs.py, until one of them misbehaves.

A call must return a correct result or raise ValueError. Everything else ends the run, also a finding of the sanitizers
or a call that takes too long: the call is printed with a way to repeat it. `make fuzz` builds the extension with
sanitizers and runs this twice: first on cases drawn from a seed, which needs nothing more; then atheris continues from
the first of them, guided by the branches of the core that they reach.

Unlike in atheris' manual, where libFuzzer reads clang's coverage, gcc's coverage is passed to it (fuzz_coverage.cpp).
So its warning of broken coverage can be ignored.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import multiprocessing
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _packing as packing
from fuzz_inputs import call
from fuzz_results import HOLDS

TOO_LONG = 20  # seconds
BRANCHES = 2**14
FIRST = 200  # cases from which atheris begins
FAILING = Path(packing.__file__).with_name("failing")


def one(data: bytes) -> bool:
    """Make one call from the bytes; return whether it gave a result. Raises any error that is not allowed."""
    name, given = call(data)
    try:
        made = getattr(packing, name)(**given)
    except ValueError:
        return False
    assert HOLDS[name](given, made), f"{name} gave {made}"
    return True


def one_noted(data: bytes) -> None:
    """Write the bytes of a call that ends the process, which atheris does not always do."""
    FAILING.write_bytes(data)
    one(data)


def bytes_of(seed: int, case: int) -> bytes:
    draw = random.Random(f"{seed} {case}")
    return draw.randbytes(draw.choice([40, 100, 1000, 4000]))


def explore(seed: int, seconds: float, case: Any) -> None:
    results, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        signal.alarm(TOO_LONG)
        results += one(bytes_of(seed, case.value))
        case.value += 1
    print(f"{case.value} calls of seed {seed}: {results} gave a result, the others were refused", flush=True)


def explore_guided(seed: int, seconds: float, corpus: str) -> None:
    atheris = importlib.import_module("atheris")
    for case in range(FIRST):
        Path(corpus, str(case)).write_bytes(bytes_of(seed, case))
    options = [f"-seed={seed + 1}", f"-max_total_time={seconds:.0f}", f"-timeout={TOO_LONG}", "-len_control=0"]
    options += [f"-exact_artifact_path={FAILING}", "-verbosity=0", "-print_final_stats=1", "-detect_leaks=0"]
    atheris.Setup([sys.argv[0], *options, corpus], one_noted)
    places = (ctypes.c_uint64 * (2 * BRANCHES))()
    register_branches(places)
    atheris.Fuzz()


def register_branches(places: Any) -> None:
    """Tell libFuzzer where the core counts its branches, and pass the table that it needs, without places."""
    libfuzzer = ctypes.CDLL(importlib.import_module("atheris.core_with_libfuzzer").__file__)
    branches = (ctypes.c_uint8 * BRANCHES).in_dll(ctypes.CDLL(packing.__file__), "mgrpo_branches")
    register = (libfuzzer.__sanitizer_cov_8bit_counters_init, libfuzzer.__sanitizer_cov_pcs_init)
    for each, table in zip(register, (branches, places), strict=True):
        begin = ctypes.addressof(table)
        each(ctypes.c_void_p(begin), ctypes.c_void_p(begin + ctypes.sizeof(table)))


def guard(explore: Callable[..., None], *args: Any) -> int:
    """Run it in a separate process, which may crash; return its exit status, 0 if all went well."""
    child = multiprocessing.get_context("fork").Process(target=explore, args=args)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def fail(status: int, data: bytes, repeat: str) -> None:
    name, given = call(data)
    print(f"\n{name} of", file=sys.stderr)
    for key, value in given.items():
        print(f"  {key} = {str(value)[:600]}", file=sys.stderr)
    print(f"\nexit status {status}. To repeat it:", file=sys.stderr)
    sys.exit(f"  make fuzz FUZZ='{repeat}'")


def main(seed: int, seconds: float, guided: float) -> None:
    case = multiprocessing.Value(ctypes.c_int64, 0, lock=False)
    if status := guard(explore, seed, seconds, case):
        fail(status, bytes_of(seed, case.value), f"--seed {seed} --case {case.value}")
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: nothing but the cases of the seed was run")
        return
    with tempfile.TemporaryDirectory() as corpus:
        if status := guard(explore_guided, seed, guided, corpus):
            fail(status, FAILING.read_bytes(), f"--file {FAILING}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="for the cases of the seed")
    parser.add_argument("--guided", type=float, default=20, help="seconds for atheris")
    parser.add_argument("--case", type=int, help="this case of the seed alone")
    parser.add_argument("--file", type=Path, help="the bytes in this file alone")
    options = parser.parse_args()
    if options.file is not None:
        one(options.file.read_bytes())
    elif options.case is not None:
        one(bytes_of(options.seed, options.case))
    else:
        main(options.seed, options.seconds, options.guided)
