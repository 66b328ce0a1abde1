"""Choice of the instruction set, and the thread pool."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from kernel_cases import ISAS, rows, threads

from taper import kernels


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


PRINT_STATE = "from taper import kernels; print(kernels.isa(), kernels.num_threads())"


@pytest.mark.parametrize("isa", ISAS)
def test_taper_isa_forces_an_instruction_set(isa):
    assert run_python(PRINT_STATE, TAPER_ISA=isa, TAPER_NUM_THREADS="3").stdout.split() == [isa, "3"]


def test_the_best_instruction_set_is_the_default():
    assert (
        run_python(PRINT_STATE, TAPER_ISA="", TAPER_NUM_THREADS="").stdout.split()[0]
        == kernels.available_isas()[-1]
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TAPER_ISA", "sse9", "unknown instruction set 'sse9', expected one of reference, neon, neon_i8mm, "),
        ("TAPER_NUM_THREADS", "0", "TAPER_NUM_THREADS is '0', expected a number from 1 to 1024"),
        ("TAPER_NUM_THREADS", "two", "TAPER_NUM_THREADS is 'two', expected a number from 1 to 1024"),
    ],
)
def test_wrong_environment_is_a_usage_error(variable, value, message):
    failed = run_python(PRINT_STATE, **{variable: value})
    assert failed.returncode != 0
    assert "UsageError" in failed.stderr
    assert message in failed.stderr


def fail_on_the_reference():
    with kernels.use_isa("reference"):
        assert kernels.isa() == "reference"
        raise RuntimeError("stop")


def test_use_isa_goes_back_after_an_error():
    before = kernels.isa()
    with pytest.raises(RuntimeError, match="stop"):
        fail_on_the_reference()
    assert kernels.isa() == before


def test_use_isa_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"), kernels.use_isa("mmx"):
        pass


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_number_of_threads_out_of_range(count):
    with pytest.raises(ValueError, match=f"number of threads is {count}, expected 1..1024"):
        kernels.set_num_threads(count)


def test_number_of_threads_can_go_up_and_down():
    x = rows(0, 64, 4096)
    expected = kernels.exp(x)
    for count in (4, 1, 7, 2):
        with threads(count):
            assert kernels.num_threads() == count
            np.testing.assert_array_equal(kernels.exp(x), expected)


def test_workers_that_went_to_sleep_take_part_again():
    x = rows(1, 512, 4096)
    with threads(3), kernels.use_isa("reference"):
        kernels.exp(x[:16])
        time.sleep(0.05)  # far longer than the workers spin
        process, caller = time.process_time(), time.thread_time()
        kernels.exp(x)
        assert time.process_time() - process > time.thread_time() - caller


def test_callers_at_the_same_time():
    inputs = [rows(seed, 16, 4096) for seed in range(4)]
    expected = [kernels.exp(x) for x in inputs]
    wrong = []

    def call(index: int) -> None:
        for _ in range(50):
            if not np.array_equal(kernels.exp(inputs[index]), expected[index]):
                wrong.append(index)

    with threads(3):
        callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert wrong == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own():
    x = rows(2, 64, 4096)
    with threads(3):
        expected = kernels.exp(x)
        child = os.fork()
        if child == 0:
            same = kernels.num_threads() == 3 and np.array_equal(kernels.exp(x), expected)
            os._exit(0 if same and len(os.listdir("/proc/self/task")) == 3 else 1)
        deadline = time.monotonic() + 30
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if done == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done == (child, 0)


def test_calls_release_the_gil():
    """A pure Python thread keeps running while a long call is under way."""
    qkv = rows(3, 256, 3 * 64)
    values = rows(4, 1024, 64).reshape(1, 1024, 64)
    keys = values.reshape(1, 64, 64, 16)
    ticks, running = [], True

    def tick() -> None:
        while running:
            ticks.append(time.perf_counter())
            time.sleep(0)

    with threads(1), kernels.use_isa("reference"):
        ticker = threading.Thread(target=tick)
        ticker.start()
        begin = time.perf_counter()
        kernels.attention(qkv, 1, keys, values, 700, 1.0)
        end = time.perf_counter()
        running = False
        ticker.join()
    assert sum(begin < t < end for t in ticks) > 1
