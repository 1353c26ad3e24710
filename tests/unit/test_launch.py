"""What the launcher keeps for a plan, and when it must not use it."""

import pytest

triton = pytest.importorskip("triton")

from moe_ops.backends.launch import Launcher, cdiv, next_power_of_2


class Kernel:
    """Stands for a Triton kernel: `kernel[grid](...)` compiles, launches and returns the compiled kernel."""

    arg_names = ("x_ptr", "n", "BLOCK", "FLAG")

    def __init__(self):
        self.compilations, self.launches = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **options):
            self.compilations.append((grid, args, options))
            return self.Compiled(self)

        return compile_and_launch

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args: self.kernel.launches.append((grid, args))


def options():
    return {"FLAG": True, "num_warps": 4, "BLOCK": 64}


def test_the_second_launch_uses_what_the_first_compiled():
    kernel, kept = Kernel(), {}
    Launcher(kept)("up", kernel, 3, ("x", 7), options)
    Launcher(kept)("up", kernel, 5, ("y", 8), lambda: pytest.fail("options were asked for again"))
    assert kernel.compilations == [((3,), ("x", 7), {**options(), "enable_fp_fusion": True})]
    # Constexprs follow in the kernel's order, whatever the order of the options.
    assert kernel.launches == [((5, 1, 1), ("y", 8, 64, True))]


def test_another_name_or_plan_compiles_for_itself():
    kernel, kept = Kernel(), {}
    Launcher(kept)("up", kernel, 3, ("x", 7), options)
    Launcher(kept)(("up", 2), kernel, 3, ("x", 7), options)
    Launcher({})("up", kernel, 3, ("x", 7), options)
    assert len(kernel.compilations) == 3 and not kernel.launches


def test_nothing_is_kept_without_a_place_for_it():
    kernel = Kernel()
    for _ in range(2):
        Launcher(None)("up", kernel, 3, ("x", 7), options)
    assert len(kernel.compilations) == 2


def test_sums_are_tritons():
    for n in (*range(1, 70), 2**31 - 1, 2**31, 2**31 + 1):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert cdiv(n, 7) == triton.cdiv(n, 7)
