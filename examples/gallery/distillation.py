"""Distillation: a small network learns the probabilities that a large one gives.

The loss is KL(teacher ‖ student) at a temperature, torch's KLDivLoss. It takes log-probabilities, and so the student
returns them.

    python examples/gallery/distillation.py FOLDER
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import draw, race
from sklearn.datasets import load_digits
from torch import nn

import natgrad

FOLDER, SECONDS, T = Path(*sys.argv[1:]), 3.0, 3.0
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
images, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x, train, test = images.float() / 16, slice(0, 1400), slice(1400, None)
teacher = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 10))
opt = natgrad.KFAC(teacher, nn.CrossEntropyLoss())
for _ in range(60):
    loss = opt.loss(teacher(x[train]), y[train])
    opt.zero_grad()
    loss.backward()
    opt.step()
with torch.no_grad():
    given = (teacher(x) / T).log_softmax(1)
loss_fn = nn.KLDivLoss(reduction="batchmean", log_target=True)


class Student(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        pairs = pairwise((64, width, width, width, 10))
        self.net = nn.Sequential(*[m for pair in pairs for m in (nn.Linear(*pair), nn.Tanh())][:-1])

    def forward(self, x):
        return (self.net(x) / T).log_softmax(1)


def divergence(student, loss):
    return loss(student(x[train]), given[train])


ours, adam = race(Student, loss_fn, divergence, SECONDS)
figure, axes = plt.subplots(figsize=(6, 3.6))
result = draw(axes, ours, adam, "divergence from the teacher")
axes.set(xscale="log", yscale="log")
figure.savefig(FOLDER / "distillation.png")
agrees = (ours.model(x[test]).argmax(1) == given[test].argmax(1)).float().mean()
print(f"divergence after {SECONDS:g} s: KFAC {result}; ", end="")
print(f"the student of KFAC agrees with its teacher on {agrees:.3f} of the test digits")
