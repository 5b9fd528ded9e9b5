"""SE layers computed together with the layers around them: `replace(model, level="block")`.

program.py reads a module's forward off as a list of calls; neighbours.py joins an SE layer there with what stands
around it; find.py chooses the module and compares; fused.py runs the joined call, by the rule of cost.py; block.py is
the class of a replaced module.
"""

from .block import BlockSwap, FusedBlock
from .find import find_blocks

__all__ = ["BlockSwap", "FusedBlock", "find_blocks"]
