"""Memory that every training step uses again: fresh pages for something large cost more than what is written there."""

import torch
from torch import Tensor


class Memory:
    """Tensors by name that the next step writes over, and tensors that are lent until somebody gives them back."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._free: dict[tuple[int, ...], list[Tensor]] = {}

    def kept(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        room = self._kept.get(name)
        if room is None or room.shape != shape or room.dtype != dtype:
            room = self._kept[name] = torch.empty(shape, dtype=dtype)
        return room

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        """In float32, with anything in it. Nobody else holds it: what autograd is given, it need not copy."""
        free = self._free.get(shape)
        return free.pop() if free else torch.empty(shape)

    def give_back(self, tensor: Tensor) -> None:
        """For the next who asks for this shape; nobody may use it from here on. What is no such memory is let go."""
        if tensor.is_contiguous() and tensor.dtype == torch.float32 and tensor.device.type == "cpu":
            self._free.setdefault(tuple(tensor.shape), []).append(tensor)
