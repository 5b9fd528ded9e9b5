"""A backend that lists what it is asked for."""

import torch

from se_fused.backends import Backend


class Watching(Backend):
    """Computes as `backend` and lists what it was asked for."""

    def __init__(self, backend):
        self.name, self._backend, self.asked = "watching", backend, []

    def why_not(self, device):
        if not torch.compiler.is_compiling():  # which would run this again after the region
            self.asked.append("why_not")
        return self._backend.why_not(device)

    def forward_out(self, *args):
        self.asked.append("forward_out")
        self._backend.forward_out(*args)

    def backward_out(self, *args):
        self.asked.append("backward_out")
        self._backend.backward_out(*args)
