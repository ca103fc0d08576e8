"""A T5 encoder that lies on disk: one block at a time is in memory, while it computes.

B texts  L tokens  E encoder width
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from floyd.store.filling import Quantization, check_keys, pour, quantizing
from floyd.store.lazy import Renamed
from floyd.store.t5 import EMBEDDING, T5State

_BLOCK = "encoder.block."


class LayeredT5Encoder:
    """Computes what the whole encoder would, bit for bit, and reads all its weights anew each time.

    To a pipeline it is an encoder that is neither moved nor cast; calls at the same time wait for each other.
    """

    def __init__(
        self,
        model: Any,
        state: T5State,
        *,
        dtype: torch.dtype,
        place: str,
        fingerprint: str,
        quantization: Quantization | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`model`: a T5EncoderModel on the meta device."""
        self.config, self.dtype, self.device = model.config, dtype, torch.device(device)
        self.fingerprint = fingerprint
        self._model, self._state, self._place = model.eval(), state, place
        self._lock = Lock()
        if quantization is not None:
            quantizing().prepare(model, quantization.name)
        check_keys(model.state_dict().keys(), state.keys(), f"{place} does not fit {type(model).__name__}")
        norm = {"weight": "encoder.final_layer_norm.weight"}
        self._fill(model.encoder.final_layer_norm, norm)
        for number, block in enumerate(model.encoder.block):
            prefix = f"{_BLOCK}{number}."
            names = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
            block.register_forward_pre_hook(self._bringing(names))
            block.register_forward_hook(_left, always_call=True)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        ids, positions = input_ids.cpu().unique(return_inverse=True)
        rows = self._state.rows(EMBEDDING, ids).to(self.dtype)
        states_BLE = rows[positions].to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        with self._lock:
            return self._model(inputs_embeds=states_BLE, attention_mask=mask)

    def to(self, device: torch.device | str) -> LayeredT5Encoder:
        """Where to compute; on disk it stays."""
        with self._lock:
            self.device = torch.device(device)
            self._model.encoder.final_layer_norm.to(self.device)
        return self

    def __repr__(self) -> str:
        return f"LayeredT5Encoder({self._place!r}, {self.dtype}, {self.device})"

    def _bringing(self, names: Mapping[str, str]) -> Any:
        def bring(block: nn.Module, args: tuple[Any, ...]) -> None:
            self._fill(block, names)

        return bring

    def _fill(self, module: nn.Module, names: Mapping[str, str]) -> None:
        wide = getattr(self._model, "_keep_in_fp32_modules", None) or ()
        pour(module, Renamed(self._state, names), dtype=self.dtype, place=self._place, wide=wide)
        module.to(self.device)


def _left(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    block.to("meta")
