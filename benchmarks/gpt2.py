"""GPT-2 small (124M parameters, random weights): time and peak memory of K-FAC's steps and of a solve.

python benchmarks/gpt2.py
python benchmarks/gpt2.py --batch 4 --length 256
"""

import argparse
import platform
import resource
import time

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import natgrad

GIB = 2**30 if platform.system() == "Darwin" else 2**20  # of ru_maxrss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=11, help="steps of the optimizer; statistics on every tenth")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    x = torch.randint(50257, (arguments.batch, arguments.length))
    y = torch.roll(x, -1, 1)
    count = sum(p.numel() for p in model.parameters())
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; {count / 1e6:.0f}M parameters, batch {arguments.batch} x {arguments.length}")
    report("model and data", time.perf_counter())

    start = time.perf_counter()
    forward_backward(model, x, y)
    report("forward and backward", start)

    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), output=logits)
    for step in range(arguments.steps):
        start = time.perf_counter()
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        d = opt.diagnostics
        kind = ", ".join(k for k in ("statistics", "inverses") if d.get(k))
        report(f"step {step}: loss {loss.item():.3f} {kind}", start)
    print("diagonal factors:", d["diagonal_factors"])

    F = opt.curvature()
    v = {n: p.grad for n, p in model.named_parameters()}
    start = time.perf_counter()
    solved = F.solve(v, damping=1e-3, damping_style="factored")
    report("solve with damping 1e-3, factored", start)
    assert all(torch.isfinite(s).all() for s in solved.values())


def logits(returned):
    return returned.logits.transpose(1, 2)


def forward_backward(model, x, y):
    nn.functional.cross_entropy(logits(model(x)), y).backward()
    model.zero_grad()


def report(what, start):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    print(f"{what:60} {time.perf_counter() - start:7.2f} s   peak {peak:5.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
