"""A check that the host never waits for the GPU, but where it reads a value on purpose."""

import torch


class Readings:
    """Within it the host may wait for the GPU in calls of `.item()` alone, which are counted."""

    def __enter__(self) -> "Readings":
        self.count, self._item = 0, torch.Tensor.item

        def item(tensor: torch.Tensor) -> float:
            if not tensor.is_cuda:
                return self._item(tensor)
            self.count += 1
            torch.cuda.set_sync_debug_mode("default")
            value = self._item(tensor)
            torch.cuda.set_sync_debug_mode("error")
            return value

        torch.Tensor.item = item
        torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        torch.Tensor.item = self._item
