# SPDX-License-Identifier: Apache-2.0
"""Correctness and speed of the PyTorch platform on one NVIDIA GPU, in one call: ``python benchmarks/gpu.py``.

Correctness comes first, against float64 on the CPU. Then rows beside a copy of the same bytes on the device, grouped
products beside dense ones of the same arithmetic, and a whole layer of the size of DeepSeek-V3 16B. Times are medians
of device events, of repetitions that take turns. Results go into ``$OUT/gpu.json`` (or the folder given with
``--out``). A part that fails says so, and the others still run.

It needs torch and triton, and this repository's packages beside it; nothing has to be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends" / "torch")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

try:
    import array_api_compat  # noqa: F401
except ModuleNotFoundError:  # scikit-learn brings a copy, for machines where nothing can be installed
    import sklearn.externals.array_api_compat as _copy

    sys.modules["array_api_compat"] = _copy

TOKENS, DIM, HIDDEN, EXPERTS, TOP_K, SHARED = 16384, 2048, 1408, 64, 6, 2
ROWS = TOKENS * TOP_K
BF16 = torch.bfloat16
Result = dict[str, Any]


# ---------------------------------------------------------------------------------------------------- measuring
def medians(functions: dict[str, Callable[[], Any]], repetitions: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each function; the repetitions take turns, so that all see the same clocks."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(warmup + repetitions):
        for name, function in functions.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            if repetition >= warmup:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """``|got - want| / |want|`` in float64; NaN fails every comparison."""
    want = want.detach().cpu().double()
    return ((got.detach().cpu().double() - want).norm() / want.norm()).item()


def balanced(rows: int = ROWS, groups: int = EXPERTS) -> torch.Tensor:
    """The same number of rows for each group."""
    return torch.full((groups,), rows // groups, dtype=torch.int64, device="cuda")


def skewed(rows: int = ROWS, groups: int = EXPERTS) -> torch.Tensor:
    """Half of all rows for one group, none for four of them, the rest spread like 1/rank."""
    share = 1.0 / torch.arange(1, groups + 1, dtype=torch.float64)
    share[groups // 3] = 0
    share[-3:] = 0
    sizes = (share / share.sum() * (rows // 2)).long()
    sizes[groups // 2] += rows - sizes.sum()
    return sizes.cuda()


def platform() -> Any:
    """This process as the only rank of an NCCL world."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from hyperep_torch.platform import join

    return join("cuda")


# -------------------------------------------------------------------------------------------------- correctness
def check_rows(p: Any) -> Result:
    """Row gathers and sums, forward and backward."""
    tokens, terms, found = 257, 6, {}
    for dim in (64, 200, 2048):
        for dtype in (torch.float32, BF16):
            x = torch.randn(tokens * terms, dim, device="cuda").to(dtype).requires_grad_()
            w = torch.rand(tokens, terms, device="cuda").requires_grad_()
            index = torch.randperm(tokens * terms, device="cuda")
            inverse = torch.argsort(index)
            g, gs = torch.randn_like(x), torch.randn(tokens, dim, device="cuda").to(dtype)
            exact_x, exact_w = (t.detach().cpu().double().requires_grad_() for t in (x, w))
            out = p.permute_rows(x, index, inverse)
            assert torch.equal(out, x[index]), f"permute_rows {dim} {dtype}"
            assert torch.equal(torch.autograd.grad(out, x, g)[0], g[inverse]), f"its gradient {dim} {dtype}"
            summed = p.sum_rows(x, index.view(tokens, terms), inverse, w)
            plain = p.sum_rows(x, index.view(tokens, terms), inverse)
            want = (exact_x[index.cpu()].view(tokens, terms, dim) * exact_w[:, :, None]).sum(1)
            want_plain = exact_x[index.cpu()].view(tokens, terms, dim).sum(1)
            pairs = [(summed, want), (plain, want_plain)]
            pairs += zip(
                torch.autograd.grad(summed, [x, w], gs),
                torch.autograd.grad(want, [exact_x, exact_w], gs.cpu().double()),
                strict=True,
            )
            pairs += zip(
                torch.autograd.grad(plain, [x], gs),
                torch.autograd.grad(want_plain, [exact_x], gs.cpu().double()),
                strict=True,
            )
            worst = max(relative(a, b) for a, b in pairs)
            assert worst < (1e-5 if dtype == torch.float32 else 1e-2), f"sum_rows {dim} {dtype}: {worst}"
            found[f"{dim} {dtype}"] = worst
    return {"worst_relative_error": found}


def check_experts(p: Any) -> Result:
    """grouped_matmul and grouped_swiglu with uneven and empty groups."""
    found = {}
    for name, sizes in {"uneven": (37, 0, 5, 200, 0, 14), "one": (0, 0, 256, 0, 0, 0)}.items():
        shapes = [(sum(sizes), 256), (6, 128, 256), (6, 256, 128), (6, 128, 256)]
        tensors = [(torch.randn(s, device="cuda") / s[-1] ** 0.5).to(BF16).requires_grad_() for s in shapes]
        tensors[0] = torch.randn(shapes[0], device="cuda").to(BF16).requires_grad_()
        exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
        g = torch.randn(shapes[0], device="cuda").to(BF16)
        poison = torch.full((1 << 24,), float("nan"), device="cuda", dtype=BF16)
        del poison  # so that memory that nobody writes is likely to be NaN
        out = p.grouped_swiglu(*tensors, torch.tensor(sizes, device="cuda"))
        got = [out, *torch.autograd.grad(out, tensors, g)]
        x, w1, w2, w3 = exact
        parts = zip(x.split(sizes), w1, w2, w3, strict=True)
        want = torch.cat([(F.silu(r @ a.t()) * (r @ c.t())) @ b.t() for r, a, b, c in parts])
        expected = [want, *torch.autograd.grad(want, exact, g.cpu().double())]
        errors = [relative(a, b) for a, b in zip(got, expected, strict=True)]
        assert max(errors) < 2e-2, f"grouped_swiglu {name}: {errors}"
        empty = [i for i, n in enumerate(sizes) if not n]
        assert not any(t[empty].any().item() for t in got[2:]), "a group without rows has a gradient"
        found[name] = errors
    return {"relative_errors_out_x_w1_w2_w3": found}


def check_layer(p: Any) -> Result:
    """A sharded layer in float32 and bfloat16 against the CPU's in float64."""
    from datetime import timedelta

    from hyperep_torch.device import CPU
    from hyperep_torch.groups import SELF
    from hyperep_torch.platform import TorchPlatform
    from hyperep_torch.world import World

    import hyperep
    from hyperep.moe import MoE

    alone = World(rank=0, size=1, kind=CPU, device=torch.device("cpu"), group=SELF, timeout=timedelta(seconds=60))
    host = TorchPlatform(alone)
    found = {}
    for dtype, bound in ((torch.float32, 1e-3), (BF16, 3e-2)):
        mesh = hyperep.init_device_mesh(p, (1,), ("ep",))
        layer, exact = MoE(p, 128, 64, 8, 2, seed=1), MoE(host, 128, 64, 8, 2, seed=1)
        hyperep.ExpertParallel().apply(p.named_modules(layer)["experts"], mesh)
        p.named_modules(layer)["experts"].to(dtype)
        x = torch.randn(300, 128, device="cuda").to(dtype)
        g = torch.randn_like(x)
        names = list(p.parameters(layer))
        out, pull = p.vjp(layer, x, parameters=[p.parameters(layer)[n] for n in names])
        want, pull_exact = host.vjp(
            exact.double(), x.cpu().double(), parameters=[host.parameters(exact)[n] for n in names]
        )
        pairs = {"out": (out, want)}
        both = zip(("x", *names), pull(g), pull_exact(g.cpu().double()), strict=True)
        pairs |= {name: (a, b) for name, a, b in both}
        found[str(dtype)] = {name: relative(a, b) for name, (a, b) in pairs.items()}
        # The router's own gradient is small beside the rounding of bfloat16 outputs, so it is held to less there.
        assert all(e < bound * (5 if "gate" in n else 1) for n, e in found[str(dtype)].items()), found
    return {"relative_errors": found}


# --------------------------------------------------------------------------------------------------------- rows
def time_rows(p: Any) -> Result:
    """Permute and unpermute, forward and backward, beside a copy on the device of the same bytes."""
    from hyperep_torch import triton_kernels as kernels

    from hyperep.permutation import generate_permute_indices, inverse_permutation

    x = torch.randn(ROWS, DIM, device="cuda").to(BF16)
    bytes_moved = 2 * x.numel() * x.element_size()
    target, leaf = torch.empty_like(x), x.clone().requires_grad_()
    counts = skewed(ROWS, EXPERTS).cpu().numpy()
    runs, back = generate_permute_indices(counts, 8, 8)[0], inverse_permutation(counts, 8, 8)
    results: Result = {"bytes": bytes_moved}
    permutations = {
        "runs": (torch.from_numpy(runs).cuda(), torch.from_numpy(back).cuda()),
        "random": (order := torch.randperm(ROWS, device="cuda"), torch.argsort(order)),
    }
    for name, (index, inverse) in permutations.items():
        permuted, unpermuted = p.permute_rows(leaf, index, inverse), p.permute_rows(leaf, inverse, index)
        times = medians(
            {
                "copy": lambda: target.copy_(x),
                "clone": lambda: x.clone(),
                "permute": lambda: p.permute_rows(x, index, inverse),  # noqa: B023
                "permute backward": lambda: torch.autograd.grad(permuted, leaf, x, retain_graph=True),  # noqa: B023
                "unpermute": lambda: p.permute_rows(x, inverse, index),  # noqa: B023
                "unpermute backward": lambda: torch.autograd.grad(unpermuted, leaf, x, retain_graph=True),  # noqa: B023
                "index_select": lambda: x.index_select(0, index),  # noqa: B023
                "x[index]": lambda: x[index],  # noqa: B023
            }
        )
        rates = {k: bytes_moved / ms / 1e6 for k, ms in times.items()}
        results[name] = {"ms": times, "GB/s": rates, "of_copy": {k: r / rates["copy"] for k, r in rates.items()}}
        for k, ms in times.items():
            print(f"  {name:7} {k:19} {ms:7.3f} ms {rates[k]:7.0f} GB/s {rates[k] / rates['copy']:6.1%} of copy")
    index = permutations["random"][0]
    variants = {}
    for block in (1024, 2048):
        for warps in (1, 2, 4, 8):
            grid = (ROWS, DIM // block)
            variants[f"block {block} warps {warps}"] = lambda b=block, w=warps, g=grid: kernels._gather_rows[g](
                x, index, target, DIM, BLOCK=b, num_warps=w
            )
    results["variants"] = {k: bytes_moved / ms / 1e6 for k, ms in medians(variants).items()}
    print("  variants GB/s:", {k: round(v) for k, v in results["variants"].items()})
    tokens = torch.randn(TOKENS, DIM, device="cuda").to(BF16)
    weights = torch.rand(TOKENS, TOP_K, device="cuda")
    owner, by_token = index // TOP_K, torch.argsort(index).view(TOKENS, TOP_K)
    gate, up, g = (torch.randn(ROWS, HIDDEN, device="cuda").to(BF16) for _ in range(3))
    row, token, hidden = (t.numel() * 2 for t in (x, tokens, gate))
    jobs = {
        "expand by index_select": (lambda: tokens.index_select(0, owner), row + token),
        "expand by kernel": (lambda: kernels.gather_rows(tokens, owner), row + token),
        "sum_rows": (lambda: kernels.sum_rows(x, by_token, weights), row + token),
        "sum_rows backward": (lambda: kernels.sum_rows_backward(tokens, x, by_token, weights), 2 * row + token),
        "swiglu": (lambda: kernels.swiglu(gate, up), 3 * hidden),
        "swiglu backward": (lambda: kernels.swiglu_backward(g, gate, up), 6 * hidden),
        "add_": (lambda: target.add_(x), 3 * row),
    }
    times = medians({k: f for k, (f, _) in jobs.items()})
    results["others"] = {k: {"ms": ms, "GB/s": jobs[k][1] / ms / 1e6} for k, ms in times.items()}
    for k, v in results["others"].items():
        print(f"  {k:22} {v['ms']:7.3f} ms {v['GB/s']:7.0f} GB/s")
    return results


# ----------------------------------------------------------------------------------------------------- products
def time_products(p: Any) -> Result:
    """Grouped products beside dense ones of the same arithmetic: forward, gradient of the rows, of the weights."""
    x, g = torch.randn(ROWS, DIM, device="cuda").to(BF16), torch.randn(ROWS, HIDDEN, device="cuda").to(BF16)
    weight = torch.randn(EXPERTS, HIDDEN, DIM, device="cuda").to(BF16)
    turned = weight.transpose(1, 2).contiguous()
    results: Result = {}
    arithmetic = 2 * ROWS * DIM * HIDDEN
    for name, sizes in {"balanced": balanced(), "skewed": skewed()}.items():
        stops = sizes.cumsum(0).to(torch.int32)
        jobs = {
            "dense forward": lambda: x @ weight[0].t(),
            "forward": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=stops),  # noqa: B023
            "forward, turned weight": lambda: F.grouped_mm(x, turned, offs=stops),  # noqa: B023
            "dense rows' gradient": lambda: g @ weight[0],
            "rows' gradient": lambda: F.grouped_mm(g, weight, offs=stops),  # noqa: B023
            "rows' gradient, turned weight": lambda: F.grouped_mm(g, turned.transpose(1, 2), offs=stops),  # noqa: B023
            "dense weights' gradient": lambda: g.t() @ x,
            "weights' gradient": lambda: F.grouped_mm(g.t(), x, offs=stops),  # noqa: B023
            "weights' gradient, turned": lambda: F.grouped_mm(x.t(), g, offs=stops),  # noqa: B023
        }
        if name == "balanced":
            jobs["batched forward"] = lambda: torch.bmm(x.view(EXPERTS, -1, DIM), weight.transpose(1, 2))
            jobs["batched weights' gradient"] = lambda: torch.bmm(
                g.view(EXPERTS, -1, HIDDEN).transpose(1, 2), x.view(EXPERTS, -1, DIM)
            )
        times = medians(jobs)
        dense = {k.removeprefix("dense "): ms for k, ms in times.items() if k.startswith("dense ")}
        results[name] = {"ms": times}
        for k, ms in times.items():
            limit = next(v for part, v in dense.items() if part in k)
            results[name][k] = {"TFLOP/s": arithmetic / ms / 1e9, "of_dense": limit / ms}
            print(f"  {name:8} {k:30} {ms:7.3f} ms {arithmetic / ms / 1e9:6.0f} TFLOP/s {limit / ms:6.1%} of dense")
    return results


# -------------------------------------------------------------------------------------------------------- layer
def make_layer(p: Any) -> torch.nn.Module:
    """The layer with its shared experts in bfloat16, the router in float32, sharded over the one rank."""
    import hyperep
    from hyperep.moe import MoEConfig, RouterConfig, build_moe

    router = RouterConfig(num_experts=EXPERTS, top_k=TOP_K)
    config = MoEConfig(dim=DIM, hidden_dim=HIDDEN, router=router, num_shared_experts=SHARED)
    layer = build_moe(p, config, seed=1)
    parts = p.named_modules(layer)
    hyperep.ExpertParallel().apply(parts["experts"], hyperep.init_device_mesh(p, (1,), ("ep",)))
    parts["experts"].to(BF16)
    parts["shared_experts"].to(BF16)
    return layer


def time_layer(p: Any) -> Result:
    """The dsv3-16b layer, forward + backward: time, memory, host synchronisations, and where the time goes."""
    layer = make_layer(p)
    x = torch.randn(TOKENS, DIM, device="cuda").to(BF16).requires_grad_()
    g = torch.randn_like(x)

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        layer(x).backward(g)

    with torch.no_grad():
        times = medians({"layer forward": lambda: layer(x)}, 10)
    times |= medians({"layer": step, "same arithmetic, dense": dense_arithmetic()}, 20)
    step()
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    weights = sum(t.numel() * t.element_size() for t in layer.parameters())
    results: Result = {"ms": times, "peak_GiB": peak / 2**30, "weights_GiB": weights / 2**30}
    results["resident_with_gradients_GiB"] = resident / 2**30
    results["synchronisations"] = synchronisations(step)
    print(f"  {times}")
    print(f"  peak {peak / 2**30:.3f} GiB, weights {weights / 2**30:.3f}, weights and gradients {resident / 2**30:.3f}")
    print(f"  synchronisations: {results['synchronisations']}")
    results["kernels"] = profile(step)
    return results


def dense_arithmetic() -> Callable[[], None]:
    """The products of the layer, forward and backward, as dense ones: what remains if all else were free."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(BF16)

    routed = random(ROWS, DIM), random(ROWS, HIDDEN), random(HIDDEN, DIM)
    shared = random(TOKENS, DIM), random(TOKENS, SHARED * HIDDEN), random(SHARED * HIDDEN, DIM)

    def products() -> None:
        for x, hidden, weight in (routed, shared):
            for _ in range(3):
                x @ weight.t()
                hidden @ weight
                hidden.t() @ x

    return products


def synchronisations(step: Callable[[], None]) -> list[str]:
    """Where a step waits for the device, as PyTorch's sync debug mode reports it."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def profile(step: Callable[[], None]) -> list[tuple[str, float, int]]:
    """Device milliseconds and calls of each kernel of a step, and how long the device idled between them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    totals: dict[str, list[float]] = {}
    for event in on_device:
        totals.setdefault(event.name, [0.0, 0])
        totals[event.name][0] += event.time_range.elapsed_us() / 3e3
        totals[event.name][1] += 1 / 3
    begins = [e.time_range.start for e in on_device]
    span = (max(e.time_range.end for e in on_device) - min(begins)) / 3e3
    busy = sum(ms for ms, _ in totals.values())
    print(f"  device busy {busy:.2f} ms of {span:.2f} ms a step")
    lines = sorted(((name, ms, round(calls)) for name, (ms, calls) in totals.items()), key=lambda t: -t[1])
    for name, ms, calls in lines[:28]:
        print(f"  {ms:8.3f} ms {calls:4} x {name[:100]}")
    return lines


# --------------------------------------------------------------------------------------------------------- main
SECTIONS = {
    "check rows": check_rows,
    "check experts": check_experts,
    "check layer": check_layer,
    "rows": time_rows,
    "products": time_products,
    "layer": time_layer,
}


def main() -> int:
    """Run the sections that were asked for; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this section (repeatable)")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder for gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device; nothing was measured")
        return 1
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    p = platform()
    import triton

    properties = torch.cuda.get_device_properties(0)
    found: Result = {"device": properties.name, "torch": torch.__version__, "triton": triton.__version__}
    print(found)
    failed = False
    for name in arguments.only or SECTIONS:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        try:
            found[name] = SECTIONS[name](p)
        except Exception as error:
            failed = True
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc(limit=-4, file=sys.stdout)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"   ({time.perf_counter() - began:.1f} s)", flush=True)
        Path(arguments.out, "gpu.json").write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
