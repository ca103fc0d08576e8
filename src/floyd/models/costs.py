"""What one pass through a network costs: arithmetic, and the most numbers that are alive at once beside the weights.

By formula, from the configuration and the picture's sides alone: no network is built, nothing runs. The formulas follow
the layers line by line (a tensor that a frame still names is alive), and tests hold them against a traced pass.

X input of a layer  R resampled input  O output, all in numbers (channels * height * width)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from floyd.models.configs import DOWN_BLOCKS, MID_BLOCKS, UP_BLOCKS, BlockType, UNetConfig
from floyd.models.vae import AutoencoderKLConfig

TEXT_TOKENS = 77


class Cost(NamedTuple):
    """Of one picture (one branch of the guidance) and one pass."""

    flops: float
    numbers: float  # alive at once at the worst moment
    text_numbers: float = 0.0  # of these, what the text was read as: alive through all steps


@dataclass
class _Walk:
    """A forward pass in thought."""

    film: bool
    scaled: bool
    text_width: int
    num_text: int
    flops: float = 0.0
    peak: float = 0.0
    text_numbers: float = 0.0
    skips: list[tuple[int, float]] = field(default_factory=list)  # channels, pixels

    def alive(self, numbers: float) -> None:
        """Beside the skips."""
        self.peak = max(self.peak, numbers + sum(channels * pixels for channels, pixels in self.skips))

    def conv(self, channels: int, out: int, pixels: float, kernel: int = 3) -> None:
        self.flops += 2 * channels * out * kernel**2 * pixels

    def resnet(
        self, channels: int, out: int, pixels: float, held: float, *, resample: float = 1.0, scaled: bool = False
    ) -> float:
        """`held` are numbers alive around it, its input among them; returns the pixels of the output."""
        x, r, o = channels * pixels, channels * pixels * resample, out * pixels * resample
        self.conv(channels, out, pixels * resample)
        self.conv(out, out, pixels * resample)
        inside = [2 * x, r + o, 3 * o]
        if resample != 1.0:
            inside += [x + r, 2 * r + o]
        end = (o if channels != out else r if resample != 1.0 else 0) + 2 * o + (o if scaled else 0)
        if channels != out:
            self.conv(channels, out, pixels * resample, 1)
        self.alive(held + max(*inside, end))
        return pixels * resample

    def added_kv(self, channels: int, pixels: float, held: float, *, only_cross: bool) -> None:
        x, text = channels * pixels, float(channels * self.num_text)
        keys = text if only_cross else x + text
        self.flops += 2 * channels * channels * pixels * (2 if only_cross else 4)
        self.flops += 4 * channels * pixels * (keys / channels)
        self.text_numbers += 2 * text
        own = 0 if only_cross else 2 * keys
        self.alive(held + own + max(x * 5, 3 * x + (0 if only_cross else 2 * x)))

    def transformer(self, channels: int, pixels: float, held: float, *, only_cross: bool) -> None:
        x, text = channels * pixels, float(channels * self.num_text)
        others = self.num_text if only_cross else pixels
        linear = 2 * channels * channels * pixels
        self.flops += linear * (2 + (2 if only_cross else 4) + 2 + 12) + 4 * x * (others + self.num_text)
        self.text_numbers += text * (4 if only_cross else 2)
        self.alive(held + 21 * x)

    def attention(self, block: BlockType, channels: int, pixels: float, held: float, *, only_cross: bool) -> None:
        if block.attention == "added_kv":
            self.added_kv(channels, pixels, held, only_cross=only_cross)
        elif block.attention == "transformer":
            self.transformer(channels, pixels, held, only_cross=only_cross)


def unet_cost(config: UNetConfig, height: int, width: int, *, num_text: int = TEXT_TOKENS) -> Cost:
    """One row of a UNet's batch through `step`; the sides are those of what it paints on."""
    is_simple = any(DOWN_BLOCKS[kind].is_simple for kind in config.down_block_types)
    walk = _Walk(
        film=config.resnet_time_scale_shift == "scale_shift",
        scaled=is_simple and config.resnet_out_scale_factor != 1.0,
        text_width=config.cross_attention_dim,
        num_text=num_text,
    )
    pixels, widths = float(height * width), config.block_out_channels
    walk.conv(config.in_channels, widths[0], pixels)
    walk.skips.append((widths[0], pixels))
    channels = widths[0]
    for level, kind in enumerate(config.down_block_types):
        pixels = _down(walk, config, DOWN_BLOCKS[kind], level, channels, pixels)
        channels = widths[level]
    mid = MID_BLOCKS[config.mid_block_type]
    x = channels * pixels
    walk.resnet(channels, channels, pixels, 0)
    only = config.only_cross_in_the_middle and mid.attention == "added_kv"
    walk.attention(mid, channels, pixels, x, only_cross=only)
    walk.resnet(channels, channels, pixels, x)
    for i, kind in enumerate(config.up_block_types):
        channels, pixels = _up(walk, config, UP_BLOCKS[kind], i, channels, pixels)
    walk.conv(channels, config.out_channels, pixels)
    walk.alive(3 * channels * pixels)
    return Cost(walk.flops, walk.peak + walk.text_numbers, walk.text_numbers)


def _down(walk: _Walk, config: UNetConfig, block: BlockType, level: int, channels: int, pixels: float) -> float:
    out, is_last = config.block_out_channels[level], level == len(config.block_out_channels) - 1
    scaled = walk.scaled and block.is_simple
    for _ in range(config.layers_at(level)):
        walk.resnet(channels, out, pixels, 0, scaled=scaled)
        walk.attention(block, out, pixels, out * pixels, only_cross=config.only_cross_at(level))
        walk.skips.append((out, pixels))
        channels = out
    if not is_last:
        if block.is_simple:
            walk.resnet(out, out, pixels, 0, resample=0.25, scaled=scaled)
        else:
            walk.conv(out, out, pixels / 4)
        pixels /= 4
        walk.skips.append((out, pixels))
    return pixels


def _up(walk: _Walk, config: UNetConfig, block: BlockType, i: int, channels: int, pixels: float) -> tuple[int, float]:
    last = len(config.block_out_channels) - 1
    level = last - i
    out, scaled = config.block_out_channels[level], walk.scaled and block.is_simple
    entry = channels * pixels  # the caller names the block's input until the block returns
    for number in range(config.layers_at(level) + 1):
        skip, _ = walk.skips.pop()
        joined = channels + skip
        held = entry + (0 if number == 0 else channels * pixels) + joined * pixels
        walk.resnet(joined, out, pixels, held, scaled=scaled)
        walk.attention(block, out, pixels, entry + out * pixels, only_cross=config.only_cross_at(level))
        channels = out
    if level > 0:
        held = entry + out * pixels
        if block.is_simple:
            walk.resnet(out, out, pixels, held, resample=4.0, scaled=scaled)
        else:
            walk.conv(out, out, pixels * 4)
            walk.alive(held + 8 * out * pixels)
        pixels *= 4
    return channels, pixels


def decoder_cost(config: AutoencoderKLConfig, height: int, width: int) -> Cost:
    """One latent of these sides through a VAE's decoder."""
    walk = _Walk(film=False, scaled=False, text_width=0, num_text=0)
    widths, pixels = config.block_out_channels[::-1], float(height * width)
    walk.conv(config.latent_channels, widths[0], pixels)
    channels = widths[0]
    for _ in range(2):
        _plain(walk, channels, channels, pixels, channels * pixels)
    if config.mid_block_add_attention:
        walk.flops += 8 * channels**2 * pixels + 4 * channels * pixels**2
        walk.alive(channels * pixels * 8)
    for level, out in enumerate(widths):
        entry = channels * pixels
        for number in range(config.layers_per_block + 1):
            _plain(walk, channels, out, pixels, entry + (0 if number == 0 else channels * pixels))
            channels = out
        if level < len(widths) - 1:
            walk.conv(out, out, pixels * 4)
            walk.alive(entry + out * pixels * 9)
            pixels *= 4
    walk.conv(channels, config.out_channels, pixels)
    walk.alive(3 * channels * pixels)
    return Cost(walk.flops, walk.peak)


def _plain(walk: _Walk, channels: int, out: int, pixels: float, held: float) -> None:
    x, o = channels * pixels, out * pixels
    walk.conv(channels, out, pixels)
    walk.conv(out, out, pixels)
    if channels != out:
        walk.conv(channels, out, pixels, 1)
    walk.alive(held + max(2 * x, x + o, 3 * o, (3 if channels != out else 2) * o))


def encoder_cost(config: Any, *, num_tokens: int) -> Cost:
    """One row of a transformer that reads a text or the tiles of a picture. `config` has transformers' keys."""
    width, inner = _first(config, "d_model", "hidden_size"), _first(config, "d_ff", "intermediate_size")
    layers, heads = (
        _first(config, "num_layers", "num_hidden_layers"),
        _first(config, "num_heads", "num_attention_heads"),
    )
    attended = heads * config.get("d_kv", width // heads)
    feed_forwards = 3 if config.get("d_ff") else 2  # T5's is gated
    per_token = 2 * width * (4 * attended + feed_forwards * inner) + 4 * attended * num_tokens
    alive = num_tokens * (3 * width + feed_forwards * inner + 4 * attended) + 3 * heads * num_tokens**2
    return Cost(layers * per_token * num_tokens, alive)


def _first(config: Any, *names: str) -> int:
    return int(next(config[name] for name in names if config.get(name) is not None))
