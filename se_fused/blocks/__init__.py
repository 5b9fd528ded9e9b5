"""SE layers computed together with the layers around them: `replace(model, level="block")`.

program.py reads a module's forward off as a list of calls; calls.py tells what they compute; neighbours.py joins an SE
layer there with what stands around it, and the batch norms that are left with what follows them; find.py chooses the
module and compares; fused.py runs the joined calls, by the rule of cost.py, on GPUs with the kernels of operators.py;
block.py is the class of a replaced module.
"""

from .block import BlockSwap, FusedBlock, ways_of_convolutions
from .find import find_blocks

__all__ = ["BlockSwap", "FusedBlock", "find_blocks", "ways_of_convolutions"]
