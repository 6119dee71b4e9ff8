"""Peak memory of attention on the CPU, first and second order, against eager: python benchmarks/attention_memory.py.

Each figure is the growth of the peak resident set of a fresh process over its size before the call, in MiB.
"""

import argparse
import json
import resource
import subprocess
import sys

E, EV, BATCH = 8, 32, 1
LENGTHS = (4096, 16384)
ORDERS = ("forward", "forward + backward", "forward + backward + double backward")


def growth(impl: str, length: int, order: str) -> float:
    """MiB that one run of `order` needs beyond its inputs. Run it in a process of its own: a peak never falls."""
    import torch

    from sagan_kernels.ops import attention

    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs = [torch.randn(BATCH, length, width, requires_grad=True) for width in (E, E, EV)]
    small = [torch.randn(1, 16, width, requires_grad=True) for width in (E, E, EV)]
    run(lambda *t: attention(*t, impl=impl), small, ORDERS[-1])  # loads libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(lambda *t: attention(*t, impl=impl), inputs, order)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def run(attention, inputs, order):
    import torch

    if order == ORDERS[0]:
        with torch.no_grad():
            attention(*inputs)
        return
    out = attention(*inputs).square().sum()
    slopes = torch.autograd.grad(out, inputs, create_graph=order == ORDERS[2])
    if order == ORDERS[2]:
        torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        impl, length, order = arguments.one
        print(json.dumps(growth(impl, int(length), order)))
        return
    print(f"float32, B = {BATCH}, L = S, E = {E}, Ev = {EV}, one thread\n")
    print("| L = S | order | eager | ours | ratio |\n| ---: | --- | ---: | ---: | ---: |")
    for length in arguments.lengths:
        for order in ORDERS:
            eager, ours = (
                json.loads(
                    subprocess.run(
                        [sys.executable, __file__, "--one", impl, str(length), order],
                        check=True, capture_output=True, text=True,
                    ).stdout
                )
                for impl in ("reference", "torch")
            )  # fmt: skip
            print(
                f"| {length} | {order} | {eager:.0f} MiB | {ours:.1f} MiB | {eager / max(ours, 0.1):.0f}x |"
            )


if __name__ == "__main__":
    main()
