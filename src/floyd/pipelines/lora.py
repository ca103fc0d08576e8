"""What a pipeline can do with LoRA, under the incumbent's names. peft is loaded with the first file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from floyd.adapters import attached, files, fused
from floyd.adapters.factors import Factors, read_layers, sorted_out
from floyd.adapters.keys import COMPONENTS, TEXT_ENCODER, UNET, read_key
from floyd.errors import CheckpointError
from floyd.pipelines.base import DiffusionPipeline
from floyd.runtime.sleeping import forget, wake
from floyd.store.layout import uncompiled

log = logging.getLogger(__name__)

Weight = float | Mapping[str, float] | None  # for all components, or by component


class LoraPipeline(DiffusionPipeline):
    """A pipeline whose UNet and text encoder may carry LoRA.

    It lives on the networks: pipelines that share one share its LoRA. Loading, choosing, weighing and fusing change the
    network and are not for moments at which another thread paints with it; the strength of a single call,
    `cross_attention_kwargs={"scale": 0.5}`, is that call's alone.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Load LoRA from a file, a folder, a hub id or a state dict, in any of the formats there are.

        It alone acts from then on; `set_adapters` chooses among several. `weight_name` is the file, where there are
        several. A part for a network that this pipeline was built without is left out, which is logged; anything else
        that cannot be used is an error, and then nothing is loaded.
        """
        networks = self._networks()
        name = self._new_name(adapter_name)
        self._refuse_fused("load_lora_weights")
        attached.peft()
        file = files.opened(
            pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            subfolder=subfolder,
            use_safetensors=use_safetensors,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        layers = sorted_out(file, networks)
        meant = {key.component for key in map(read_key, file.state) if key is not None}
        left_out = [n for n, network in networks.items() if network is None and n in meant]
        if not layers:
            without = f" This {type(self).__name__} was built without its {' and '.join(left_out)}." if left_out else ""
            raise CheckpointError(f"{file.name} holds no LoRA for {' or '.join(networks)} here.{without}")
        for component in left_out:
            log.warning("%s also holds LoRA for the %s, which is not here: left out.", file.name, component)
        self._attach(name, {networks[component]: own for component, own in layers.items()})
        if any(attached.is_disabled_on(network) for network in networks.values()):
            log.warning("LoRA is disabled on this %s: %s acts once you call enable_lora().", type(self).__name__, name)

    def _attach(self, name: str, layers: Mapping[nn.Module, Mapping[str, Factors]]) -> None:
        """On all networks, or on none. Theirs are then no longer the weights on the disk: they stay in memory."""
        done: list[nn.Module] = []
        for network in layers:
            wake(network)
        try:
            for network, own in layers.items():
                attached.attach(network, name, own)
                done.append(network)
        except BaseException:
            for network in done:
                attached.remove(network, [name])
            raise
        for network in layers:
            forget(network)
        for other in self._networks().values():
            attached.activate(other, [name])

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write LoRA in peft's format, which floyd, peft and the incumbent read.

        The layers are state dicts in any format but kohya's, such as `get_peft_model_state_dict(unet)`, or what
        `lora_layers` of a pipeline gives. Without metadata (a `LoraConfig` as a dict) alpha is taken to be the rank.
        """
        given = {UNET: unet_lora_layers, TEXT_ENCODER: text_encoder_lora_layers}
        told = {UNET: unet_lora_adapter_metadata, TEXT_ENCODER: text_encoder_lora_adapter_metadata}
        layers = {name: read_layers(own, f"{name}_lora_layers") for name, own in given.items() if own is not None}
        configs = {name: config for name, config in told.items() if config and layers.get(name)}
        if not any(layers.values()):
            raise ValueError("There is nothing to save: pass unet_lora_layers, text_encoder_lora_layers or both.")
        if configs and (save_function is not None or not safe_serialization):
            raise ValueError(
                "Metadata is written to safetensors files alone: leave save_function out, or the metadata."
            )
        if is_main_process:
            usual = files.SAFE_NAME if safe_serialization else files.PICKLED_NAME
            files.write(layers, Path(save_directory).expanduser() / (weight_name or usual), configs, save_function)

    def lora_layers(self, adapter_name: str | None = None) -> dict[str, dict[str, Tensor]]:
        """The layers of a loaded LoRA, by default of the one that acts, as `save_lora_weights` takes them:
        `pipe.save_lora_weights(folder, **pipe.lora_layers("name"))`. They are as strong as when they were loaded."""
        if adapter_name is None:
            active = self.get_active_adapters()
            if len(active) != 1:
                raise ValueError(
                    f"adapter_name must say which LoRA is meant: {_listed(active) or 'none'} of them act here."
                )
            adapter_name = active[0]
        self._check_known([adapter_name])
        layers = {component: attached.layers_on(net, adapter_name) for component, net in self._networks().items()}
        return {f"{component}_lora_layers": files.state_of(own) for component, own in layers.items() if own}

    # -------------------------------------------------------------------------------------------------- which of them

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Every LoRA that is loaded, by component."""
        names = {component: attached.names_on(network) for component, network in self._networks().items()}
        return {component: own for component, own in names.items() if own}

    def get_active_adapters(self) -> list[str]:
        """Those that act, or will once LoRA is enabled."""
        return list(dict.fromkeys(n for network in self._networks().values() for n in attached.active_on(network)))

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Weight | Sequence[Weight] = None,
    ) -> None:
        """Let these act, and no others, each as strongly as its weight says; None is 1.

        A weight is a number, or numbers by component: `{"unet": 0.8, "text_encoder": 0.5}`.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"adapter_weights must be one, or one for each of {_listed(names)}; got {len(given)}.")
        if len(set(names)) != len(names):
            raise ValueError(f"adapter_names names a LoRA twice: {_listed(names)}.")
        self._check_known(names)
        weights = [_by_component(weight) for weight in given]
        self._refuse_fused("set_adapters")
        for component, network in self._networks().items():
            attached.activate(network, names)
            for name, weight in zip(names, weights, strict=True):
                attached.weigh(network, name, weight[component])

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take these off. Of the others those that act go on."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        self._refuse_fused("delete_adapters")
        for network in self._networks().values():
            attached.remove(network, names)

    def unload_lora_weights(self) -> None:
        """Take all of it off; the networks are as they were. What is fused stays in the weights, for good."""
        for component, network in self._networks().items():
            if names := fused.fused_on(network):
                log.info("%s stays fused into the %s.", _listed(names), component)
            attached.remove(network, attached.names_on(network))

    def disable_lora(self) -> None:
        """Paint as if there were none, until `enable_lora`."""
        self._refuse_fused("disable_lora")
        for network in self._networks().values():
            attached.enable(network, False)

    def enable_lora(self) -> None:
        for network in self._networks().values():
            attached.enable(network, True)

    # ------------------------------------------------------------------------------------------------ in the weights

    def fuse_lora(
        self,
        components: Sequence[str] = COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Write LoRA into the weights: no cost per step, but nothing can be chosen until `unfuse_lora`.

        Those that act, or `adapter_names`, each at its weight times `lora_scale`; nothing else acts then. The weights
        that were there are kept in main memory, and `unfuse_lora` puts these very weights back. `safe_fusing` refuses
        what would not be finite.
        """
        chosen = self._chosen(components)
        _finite("lora_scale", lora_scale)
        names = None if adapter_names is None else [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if names is not None:
            self._check_known(names)
        if not any(attached.active_on(net) if names is None else names for net in chosen.values()):
            raise ValueError(f"There is no LoRA that acts on {_listed(list(chosen))}: load one, or name some.")
        if any(attached.is_disabled_on(network) for network in chosen.values()):
            raise ValueError("LoRA is disabled: call enable_lora() before fuse_lora().")
        fused.fuse(chosen.values(), names, scale=lora_scale, is_safe=safe_fusing)
        for network in chosen.values():
            there = fused.fused_on(network)
            ordered = [name for name in attached.active_on(network) if name in there]  # sums round by their order
            attached.activate(network, list(dict.fromkeys(ordered + there)))

    def unfuse_lora(self, components: Sequence[str] = COMPONENTS) -> None:
        """Put back the weights that were there before `fuse_lora`, to the bit."""
        for network in self._chosen(components).values():
            fused.unfuse(network)

    @property
    def fused_loras(self) -> set[str]:
        return {name for network in self._networks().values() for name in fused.fused_on(network)}

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    # -------------------------------------------------------------------------------------------------------- checking

    def _networks(self) -> dict[str, Any]:
        """What LoRA can be on; None where the pipeline was built without."""
        return {name: uncompiled(getattr(self, name, None)) for name in COMPONENTS}

    def _chosen(self, components: Sequence[str]) -> dict[str, Any]:
        names = [components] if isinstance(components, str) else list(components)
        if not names or (unknown := [name for name in names if name not in COMPONENTS]):
            got = _listed(unknown) if names else "none"
            raise ValueError(f"components must be some of {_listed(list(COMPONENTS))}, got {got}.")
        networks = self._networks()
        return {name: networks[name] for name in names if networks[name] is not None}

    def _names(self) -> set[str]:
        return {name for own in self.get_list_adapters().values() for name in own}

    def _new_name(self, name: str | None) -> str:
        there = self._names()
        if name is None:
            return next(free for i in count(len(there)) if (free := f"default_{i}") not in there)
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"adapter_name must be a name without dots that is no method of torch's modules, got {name!r}."
            )
        if name in there:
            raise ValueError(
                f"There is a LoRA {name!r} already: choose another adapter_name, or delete_adapters first."
            )
        return name

    def _check_known(self, names: Sequence[str]) -> None:
        there = self._names()
        if unknown := [name for name in names if name not in there]:
            raise ValueError(f"There is no LoRA {_listed(unknown)} here; there is {_listed(sorted(there)) or 'none'}.")

    def _refuse_fused(self, action: str) -> None:
        """peft would leave out in silence what is not fused, and take out with rounding what is."""
        if names := sorted(self.fused_loras):
            raise ValueError(
                f"{action}: {_listed(names)} is fused into the weights, and nothing else acts beside it. Call "
                "unfuse_lora() first, or unload_lora_weights() to keep it there for good."
            )


def _by_component(weight: Any) -> dict[str, float]:
    """One weight, for each component."""
    if not isinstance(weight, Mapping):
        return dict.fromkeys(COMPONENTS, 1.0 if weight is None else _finite("adapter_weights", weight))
    if unknown := [name for name in weight if name not in COMPONENTS]:
        raise ValueError(f"adapter_weights may be by component, {_listed(list(COMPONENTS))}; got {_listed(unknown)}.")
    return {name: 1.0 if weight.get(name) is None else _finite("adapter_weights", weight[name]) for name in COMPONENTS}


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        raise ValueError(f"{name} must be a finite number, or one for each component; got {value!r}.")
    return float(value)


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names))
