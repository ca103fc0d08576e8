"""The UNet of all IF stages and of the x4 upscaler, as diffusers' checkpoints lay it out.

B images  C channels  H height  W width  L text tokens  E encoder width  D text width in the network  T time width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from floyd.errors import ConfigError
from floyd.models.configs import DOWN_BLOCKS, MID_BLOCKS, UP_BLOCKS, UNetConfig
from floyd.models.unet_blocks import DownBlock, MidBlock, Style, UpBlock
from floyd.models.unet_told import Context, Ready, Timetable, Told
from floyd.nn.activation import activation
from floyd.nn.attention import AddedKVAttention, TextKV
from floyd.nn.embedding import TextTimeEmbedding, TimestepEmbedding, sinusoid
from floyd.nn.norm import normed
from floyd.nn.rewrites import Rewrites
from floyd.nn.transformer import Transformer2D
from floyd.store.pretrained import Model


class UNet2DConditionOutput(NamedTuple):
    sample: Tensor  # [B, out_channels, H, W]


class UNet2DConditionModel(Model):
    """Predicts noise (and, with twice the channels, its variance) from a noisy picture, the time and a text.

    Calling it reads the text anew each time. A sampler reads it once with `read` and then calls `step`.
    """

    config_class = UNetConfig
    config: UNetConfig

    def __init__(self, **keywords: object) -> None:
        super().__init__(**keywords)
        config = self.config
        widths, time_width = config.block_out_channels, config.time_width
        style = Style.of(config)

        self.conv_in = nn.Conv2d(
            config.in_channels, widths[0], config.conv_in_kernel, padding=config.conv_in_kernel // 2
        )
        self.time_embedding = TimestepEmbedding(widths[0], time_width, act_fn=config.act_fn)
        self.time_embed_act = None if config.time_embedding_act_fn is None else activation(config.time_embedding_act_fn)
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(widths[0], time_width, act_fn=config.act_fn)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_width)
        self.encoder_hid_proj: nn.Linear | None = None
        if config.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.add_embedding: TextTimeEmbedding | None = None
        if config.addition_embed_type == "text":
            encoder_width = config.encoder_hid_dim or config.cross_attention_dim
            heads = config.addition_embed_type_num_heads
            if heads < 1 or encoder_width % heads:
                raise ConfigError(
                    f"addition_embed_type_num_heads must divide the text's width, {encoder_width}, got {heads}."
                )
            self.add_embedding = TextTimeEmbedding(encoder_width, time_width, num_heads=heads)

        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock(
                DOWN_BLOCKS[kind],
                style.at_level(i),
                in_channels=widths[max(i - 1, 0)],
                channels=widths[i],
                num_layers=config.layers_at(i),
                is_last=i == last,
            )
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(MID_BLOCKS[config.mid_block_type], style.at_middle(), widths[-1])
        self.up_blocks = nn.ModuleList(
            UpBlock(
                UP_BLOCKS[kind],
                style.at_level_up(last - i),
                in_channels=widths[max(last - i - 1, 0)],
                previous_channels=widths[min(last - i + 1, last)],
                channels=widths[last - i],
                num_layers=config.layers_at(last - i) + 1,
                is_last=i == last,
            )
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_act = activation(config.act_fn)
        self.conv_out = nn.Conv2d(
            widths[0], config.out_channels, config.conv_out_kernel, padding=config.conv_out_kernel // 2
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        *,
        context: Context | None = None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """One prediction.

        `sample` [B, in_channels, H, W], sides multiples of `config.side_multiple`; `timestep` a number, [] or [B];
        `encoder_hidden_states` [B, L, E]; `class_labels` [B], the noise level, where the model has one;
        `encoder_attention_mask` [B, L], 1 for the tokens that count. `context`: what `read` made of these last three.
        """
        if context is None:
            if encoder_hidden_states is None:
                raise ValueError("Pass encoder_hidden_states, the encoded prompt, or the context that was read of it.")
            context = self.read(encoder_hidden_states, class_labels, encoder_attention_mask)
        out = self.step(sample, timestep, context)
        return UNet2DConditionOutput(out) if return_dict else (out,)

    def ready(self, rewrites: Rewrites) -> Ready | None:
        """The network rewritten for many steps with the weights that it has now; None where it must not be."""
        return Ready.of(self, self.layers(), rewrites)

    def read(
        self,
        text_BLE: Tensor,
        class_labels: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        ready: Ready | None = None,
        timesteps: Sequence[int] = (),
    ) -> Context:
        """All work that the prompt and the noise level alone decide.

        With what `ready` returned, steps that want no gradient are faster. `timesteps` that are to be expected, as
        numbers, are then prepared all at once.
        """
        parts = [part for part in (self._label(class_labels, text_BLE), self._pooled(text_BLE)) if part is not None]
        emb_BT = sum(parts[1:], parts[0]) if parts else None
        text_BLD = text_BLE if self.encoder_hid_proj is None else self.encoder_hid_proj(text_BLE)
        bias = None
        if encoder_attention_mask is not None:
            bias = ((1 - encoder_attention_mask.to(text_BLD.dtype)) * -10000.0)[:, None, None, :]
        layers = tuple(layer.read(text_BLD) for layer in self.attention_layers())
        if ready is None:
            return Context(emb_BT, layers, bias)
        layers = tuple(
            text._replace(qkv=qkv) if isinstance(text, TextKV) else text
            for text, qkv in zip(layers, ready.projections, strict=True)
        )
        context = Context(emb_BT, layers, bias, ready)
        if not timesteps:
            return context
        return replace(context, table=Timetable(timesteps, partial(self._says, context=context, like_BLE=text_BLE)))

    def step(self, sample: Tensor, timestep: Tensor | float, context: Context) -> Tensor:
        """The prediction at one moment, [B, out_channels, H, W]."""
        return self.paint(sample, self.time(timestep, context, sample), context)

    def time(self, timestep: Tensor | float, context: Context, sample: Tensor) -> Tensor:
        """[B, S]: what is told the layers about the time; the embedding comes first."""
        ready = None if torch.is_grad_enabled() else context.ready  # a table learns nothing
        if ready is not None and context.table is not None and isinstance(timestep, int):
            return context.table.row(timestep)
        t_B = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        emb_BT = self._time(t_B, context.emb_BT, sample.dtype)
        return emb_BT if ready is None else ready.says(emb_BT[None])[0]

    def paint(self, sample: Tensor, time_BS: Tensor, context: Context) -> Tensor:
        """A step that was told the time: a function of tensors alone, always the same work."""
        self._check(sample)
        x_BCHW = 2 * sample - 1.0 if self.config.center_input_sample else sample
        if context.ready is not None and context.ready.channels_last:
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        told = Told(context, time_BS, self.config.time_width)

        x_BCHW = told.convolution(self.conv_in, x_BCHW)
        skips = [x_BCHW]
        for down in self.down_blocks:
            x_BCHW = down(x_BCHW, told, skips)
        x_BCHW = self.mid_block(x_BCHW, told)
        for up in self.up_blocks:
            x_BCHW = up(x_BCHW, told, skips)
        x_BCHW = normed(self.conv_norm_out, x_BCHW, self.conv_act)
        return told.convolution(self.conv_out, x_BCHW).contiguous()

    def layers(self) -> Iterator[nn.Module]:
        """Every layer between the embeddings and the prediction, in the order of the forward pass."""
        yield self.conv_in
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from block.layers()
        yield self.conv_out

    def attention_layers(self) -> Iterator[AddedKVAttention | Transformer2D]:
        """Every layer that looks at the text, in the order of the forward pass."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from block.attentions

    def _check(self, sample: Tensor) -> None:
        multiple, (height, width) = self.config.side_multiple, sample.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"The sides of sample must be multiples of {multiple} for this UNet, got {height} by {width}: "
                f"pad or resize the picture."
            )

    def _says(self, timesteps: Sequence[int], *, context: Context, like_BLE: Tensor) -> Tensor:
        """[R, B, S]: rows of a timetable."""
        assert context.ready is not None
        rows, batch = len(timesteps), len(like_BLE)
        t_R = torch.tensor(timesteps, device=like_BLE.device)
        emb_BT = None if context.emb_BT is None else context.emb_BT.repeat(rows, 1)
        emb_RBT = self._time(t_R.repeat_interleave(batch), emb_BT, like_BLE.dtype).unflatten(0, (rows, batch))
        return context.ready.says(emb_RBT)

    def _time(self, t_B: Tensor, other_BT: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding of times, with what else there is to embed."""
        emb_BT = self.time_embedding(self._sinusoid(t_B).to(dtype))
        if other_BT is not None:
            emb_BT = emb_BT + other_BT
        return emb_BT if self.time_embed_act is None else self.time_embed_act(emb_BT)

    def _sinusoid(self, value_B: Tensor) -> Tensor:
        config = self.config
        return sinusoid(
            value_B,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )

    def _label(self, class_labels: Tensor | None, text_BLE: Tensor) -> Tensor | None:
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this UNet has no class embedding; leave them out.")
            return None
        if class_labels is None:
            raise ValueError("This UNet is conditioned on a noise level: pass class_labels, one per image.")
        if isinstance(self.class_embedding, nn.Embedding):
            return self.class_embedding(class_labels)
        return self.class_embedding(self._sinusoid(class_labels).to(text_BLE.dtype))

    def _pooled(self, text_BLE: Tensor) -> Tensor | None:
        return None if self.add_embedding is None else self.add_embedding(text_BLE)
