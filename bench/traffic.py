"""The operations of eager torch, and the bytes that they read and write."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Counts torch operations in `count`, except views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Bytes(TorchDispatchMode):
    """Counts in `moved` the bytes of the inputs and outputs of each torch operation, except views.

    Operations such as `randn_like` do not read their input.
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
