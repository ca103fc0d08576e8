"""The engine "openvino": a UNet's step compiled by OpenVINO for the CPU, in float32 or bfloat16.

B images  C channels  H height  W width  L text tokens  E encoder width  T time width
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from floyd.engines.hoisted import Films, Hoisted, flat
from floyd.engines.plain import check_inputs, check_network, embedded, read_label_and_pooled
from floyd.engines.weights import counts, probed
from floyd.errors import EngineError
from floyd.models.unet import UNet2DConditionModel

PRECISIONS = {"f32": "f32", "bf16": "bf16"}
_MOST_MODELS = 2  # compiled ones; each has a copy of the weights


@dataclass(frozen=True, eq=False)
class OpenVINOContext:
    """Prompt and noise level, read by every layer."""

    emb_BT: Tensor | None
    texts: tuple[Tensor, ...]  # key, value, key, value, …
    bias_B11L: Tensor | None
    batch: int


class OpenVINOUNet:
    """A UNet's `read` and `step`, of which OpenVINO computes the second.

    It is converted at the first step of each shape, in seconds; when the network's weights have changed, again. With
    `precision="bf16"` it computes in bfloat16 where the processor is faster at that, from float32 weights.

    Threads may share it: their steps follow each other.
    """

    def __init__(self, unet: UNet2DConditionModel, *, precision: str = "f32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        check_network(unet)
        self.unet, self.config, self.precision = unet, unet.config, precision
        self._openvino = _library()
        self._core = self._openvino.Core()
        self._lock = Lock()
        self._models: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self._weights: tuple[Tensor, ...] = ()
        self._counts: list[int] = []
        self._probed: tuple[float, ...] = ()

    @torch.no_grad()
    def read(
        self, text_BLE: Tensor, class_labels: Tensor | None = None, encoder_attention_mask: Tensor | None = None
    ) -> OpenVINOContext:
        """All work that the prompt and the noise level alone decide."""
        check_network(self.unet)
        with self._lock:
            self._follow(probing=True)
        unet = self.unet
        text_BLD = text_BLE if unet.encoder_hid_proj is None else unet.encoder_hid_proj(text_BLE)
        bias_B11L = None
        if encoder_attention_mask is not None:
            bias_B11L = ((1 - encoder_attention_mask.to(text_BLD.dtype)) * -10000.0)[:, None, None, :].contiguous()
        texts = tuple(flat(layer.read(text_BLD) for layer in unet.attention_layers()))
        return OpenVINOContext(read_label_and_pooled(unet, text_BLE, class_labels), texts, bias_B11L, len(text_BLE))

    @torch.no_grad()
    def step(self, sample: Tensor, timestep: Tensor | float, context: OpenVINOContext) -> Tensor:
        """The prediction at one moment, [B, out_channels, H, W]."""
        x_BCHW = check_inputs(self.unet, sample, context.batch)
        bias = [] if context.bias_B11L is None else [context.bias_B11L]
        with self._lock:
            self._follow(probing=False)
            films = self._films.of(embedded(self.unet, timestep, len(x_BCHW), context.emb_BT))
            inputs = [tensor.contiguous() for tensor in (x_BCHW, *films, *context.texts, *bias)]
            request = self._model(inputs, has_bias=context.bias_B11L is not None)
            for i, tensor in enumerate(inputs):
                request.set_input_tensor(i, self._openvino.Tensor(tensor.numpy(), shared_memory=True))
            request.infer()
            return torch.from_numpy(request.get_output_tensor(0).data.copy())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _follow(self, *, probing: bool) -> None:
        """Forget what was converted of weights that have changed since."""
        weights = tuple(self.unet.parameters())
        same = len(weights) == len(self._weights) and all(a is b for a, b in zip(weights, self._weights, strict=True))
        if same and self._counts == counts(weights) and not (probing and self._probed != probed(weights)):
            return
        self._models.clear()
        self._films = Films(self.unet)
        self._weights, self._counts, self._probed = weights, counts(weights), probed(weights)

    def _model(self, inputs: list[Tensor], *, has_bias: bool) -> Any:
        """A request to the compiled step for inputs of these shapes."""
        key = (*(tuple(tensor.shape) for tensor in inputs), torch.get_num_threads(), has_bias)
        if key not in self._models:
            self._models[key] = self._compiled(inputs, has_bias=has_bias).create_infer_request()
        self._models.move_to_end(key)
        while len(self._models) > _MOST_MODELS:
            self._models.popitem(last=False)
        return self._models[key]

    def _compiled(self, inputs: list[Tensor], *, has_bias: bool) -> Any:
        """Through the front end itself: `openvino.convert_model` reports every conversion over the network."""
        decoder_class = import_module("openvino.frontend.pytorch.ts_decoder").TorchScriptPythonDecoder
        manager = import_module("openvino.frontend").FrontEndManager()  # has to live as long as the model, too
        frontend = manager.load_by_framework("pytorch")
        step = Hoisted(self.unet, num_films=len(self._films.sizes), has_bias=has_bias).eval()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit.trace is deprecated; torch.export takes thrice as long
                decoder = decoder_class(step, example_input=tuple(inputs))  # has to live as long as it is read
            model = frontend.convert(frontend.load(decoder))
            shapes = {i: self._openvino.PartialShape(list(tensor.shape)) for i, tensor in enumerate(inputs)}
            model.reshape(shapes)
            return self._core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                    "PERFORMANCE_HINT": "LATENCY",
                },
            )
        except RuntimeError as error:
            raise EngineError(f"OpenVINO {self._openvino.__version__} cannot compile this network: {error}") from error


def _library() -> Any:
    try:
        return import_module("openvino")
    except ImportError as error:
        raise EngineError(
            f"The engine 'openvino' needs OpenVINO, which cannot be imported here ({error}): "
            "pip install 'floyd-if[openvino]'."
        ) from error


def prepared(unet: nn.Module, *, precision: str = "f32") -> OpenVINOUNet:
    """The network's twin, which OpenVINO computes; `precision` "f32" or "bf16"."""
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"The engine 'openvino' runs floyd's UNet2DConditionModel, got a {type(unet).__name__}.")
    return OpenVINOUNet(unet, precision=precision)
