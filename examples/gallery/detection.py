"""A detection head: which digit is in a picture, and in which box?

The objective has two terms on one shared network: cross-entropy for the class and a smooth absolute error for the box.

    python examples/gallery/detection.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import draw, race
from sklearn.datasets import load_digits
from torch import nn

FOLDER, SECONDS, SIDE, UNIT = Path(*sys.argv[1:]), 5.0, 20, 5
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
images, labels = (torch.as_tensor(a)[:1000] for a in load_digits(return_X_y=True))
x, boxes = 0.3 * torch.rand(1000, 1, SIDE, SIDE), torch.empty(1000, 3)
for i, image in enumerate(images.float().view(-1, 1, 1, 8, 8) / 16):
    size = int(torch.randint(7, 14, ()))
    left, top = torch.randint(SIDE - size + 1, (2,)).tolist()
    x[i, :, top : top + size, left : left + size] += nn.functional.interpolate(image, (size, size), mode="bilinear")[0]
    boxes[i] = torch.tensor([left, top, size]) / UNIT


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(1, 8, 5, 2), nn.Tanh(), nn.Conv2d(8, 16, 3, 2), nn.Tanh(), nn.Flatten()
        self.trunk = nn.Sequential(*layers, nn.Linear(144, 64), nn.Tanh())
        self.label, self.box = nn.Linear(64, 10), nn.Linear(64, 3)

    def forward(self, x):
        h = self.trunk(x)
        return {"label": self.label(h), "box": self.box(h)}


terms = {"label": nn.CrossEntropyLoss(), "box": nn.SmoothL1Loss()}


def loss_of(model, losses):
    out = model(x)
    return losses["label"](out["label"], labels) + 4 * losses["box"](out["box"], boxes)


ours, adam = race(Detector, terms, loss_of, SECONDS)
figure, (axes, picture) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
result = draw(axes, ours, adam, "class and box, training loss")
axes.set(yscale="log")
picture.imshow(x[:6, 0].view(2, 3, SIDE, SIDE).transpose(1, 2).reshape(2 * SIDE, 3 * SIDE), cmap="gray_r")
for i, (left, top, size) in enumerate((UNIT * ours.model(x[:6])["box"]).tolist()):
    corner = left + SIDE * (i % 3) - 0.5, top + SIDE * (i // 3) - 0.5
    picture.add_patch(plt.Rectangle(corner, size, size, fill=False, color="C2"))
picture.set(title="KFAC's boxes", xticks=[], yticks=[])
figure.savefig(FOLDER / "detection.png")
print(f"training loss after {SECONDS:g} s: KFAC {result}")
