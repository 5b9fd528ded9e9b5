"""Runs the command line, and models for it to run on."""

from typer.testing import CliRunner

from se_fused import __main__ as cli

MODEL = """
import torch
from torch import nn

class SELayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 2, bias=False), nn.ReLU(), nn.Linear(2, 8, bias=False), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]

class Pair(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.body = kind, net()

    def forward(self, x):
        y = self.body(x)
        return {"dict": {"y": y, "n": 3}, "tuple": (y.argmax(), y), "none": "text", "nan": y * float("nan")}[self.kind]

class Inline(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        x = self.conv(x)
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]

class TwoMaps(Inline):
    # It returns the gate too.

    def forward(self, x):
        x = self.conv(x)
        s = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return x * s, s

def make(kind="tuple", scale=1.0, layers=1, extra=None, flag=False):
    assert isinstance(kind, str) and (scale, layers, extra, flag) in [(1.0, 1, None, False), (0.5, 2, "a=b", True)]
    return Pair(kind)

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), SELayer(), nn.ReLU())

def broken():
    raise RuntimeError("no such weights\\nsecond line")
"""


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))
