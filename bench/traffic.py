"""What eager torch moves: the bytes that its operations read and write."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Bytes(TorchDispatchMode):
    """Counts, in `moved`, the inputs and the outputs of each of torch's operations, but for views.

    What is made like another tensor does not read that one.
    """

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read, written = (
            {(x.data_ptr(), x.nbytes) for x in tree_leaves(tensors) if isinstance(x, Tensor)}
            for tensors in (() if str(func.overloadpacket).endswith("_like") else (args, kwargs), result)
        )
        if not func.is_view:
            self.moved += sum(nbytes for _, nbytes in (*read, *written))
        return result
