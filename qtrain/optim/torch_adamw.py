"""torch's own AdamW, as a baseline that nobody can suspect: all that is added says what its states take."""

from __future__ import annotations

import torch


class TorchAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``; states have the parameters' dtype. Arguments as there."""

    def state_bytes(self) -> dict[str, int]:
        """Bytes held, by kind of state tensor, their ``total``, and ``as_float32``: what they would take there."""
        found: dict[str, int] = {}
        as_float32 = 0
        for held in self.state.values():
            for key, t in held.items():
                found[key] = found.get(key, 0) + t.numel() * t.element_size()
                as_float32 += 4 * t.numel()
        return {**found, "total": sum(found.values()), "as_float32": as_float32}
