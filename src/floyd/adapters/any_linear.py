"""LoRA beside a layer that peft does not know: quantized ones, whose weight is theirs alone to read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from floyd.adapters.factors import shape_of

_layers: Any = import_module("peft.tuners.lora.layer")


class AnyLinear(_layers.Linear):
    """base(x) + alpha / rank * B A x, whatever the base does with x."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        shape = shape_of(module)
        assert shape is not None, "only layers that have a shape are wrapped"
        return shape.inputs, shape.outputs

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Nothing: the factors come with a place of their own."""
