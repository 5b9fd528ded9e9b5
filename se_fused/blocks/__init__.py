"""SE layers written into a block, and SE layers computed with the layers around them: `replace(model, level="block")`.

trace.py reads a module's forward off as a list of calls (program.py), with functions.py for what cannot be followed.
inline.py finds SE layers that are written into it; forwards.py compares the module in every mode. calls.py tells what
calls compute; neighbours.py joins an SE layer with what stands around it, and the batch norms that are left with what
follows them; find.py chooses the module and compares. fused.py runs the calls, by the rule of cost.py, on GPUs with
the kernels of operators.py; block.py is the class of a replaced module. examine.py has what every examination needs.
"""

from .block import BlockSwap, FusedBlock, ways_of_convolutions
from .find import Block, find_blocks
from .forwards import InlineBlock, find_inline

__all__ = ["Block", "BlockSwap", "FusedBlock", "InlineBlock", "find_blocks", "find_inline", "ways_of_convolutions"]
