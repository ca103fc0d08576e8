"""The configuration files of the published checkpoints: the real keys, with the numbers of tiny networks."""

from __future__ import annotations

from typing import Any

SIDES = {"stage_1": 16, "stage_2": 32, "stage_3": 128}  # pixels, where the real ones have 64, 256 and 1024
TEXT_WIDTH = 32

VERSION = {"_diffusers_version": "0.15.0.dev0"}
COSINE: dict[str, Any] = {
    "_class_name": "DDPMScheduler", **VERSION, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001, "clip_sample": True, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "thresholding": False,
    "trained_betas": None, "variance_type": "fixed_small",
}  # fmt: skip
SAMPLING: dict[str, Any] = {
    "dynamic_thresholding_ratio": 0.95, "thresholding": True, "variance_type": "learned_range",
    "lambda_min_clipped": -5.1,
}  # fmt: skip
BETAS: dict[str, Any] = {"beta_end": 0.02, "beta_schedule": "scaled_linear", "beta_start": 0.0001}
LATENT_SAMPLING: dict[str, Any] = {
    "_diffusers_version": "0.8.0", **BETAS, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip
LATENT_NOISING: dict[str, Any] = {
    "_diffusers_version": "0.8.0", **BETAS, "clip_sample": True, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "trained_betas": None, "variance_type": "fixed_small",
}  # fmt: skip
UNET: dict[str, Any] = {
    "act_fn": "gelu", "addition_embed_type": "text", "addition_embed_type_num_heads": 2, "attention_head_dim": 16,
    "block_out_channels": [16, 32], "center_input_sample": False, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 32,
    "cross_attention_norm": "group_norm", "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim": TEXT_WIDTH,
    "encoder_hid_dim_type": "text_proj", "flip_sin_to_cos": True, "freq_shift": 0, "layers_per_block": 1,
    "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1, "mid_block_type":
    "UNetMidBlock2DSimpleCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 8, "num_class_embeds": None,
    "only_cross_attention": False, "out_channels": 6, "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "scale_shift",
    "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "timestep_post_act": None,
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"], "upcast_attention": False,
    "use_linear_projection": False,
}  # fmt: skip
UNET_ONE = {**UNET, "in_channels": 3, "sample_size": SIDES["stage_1"]}
UNET_TWO = {
    **UNET, "in_channels": 6, "sample_size": SIDES["stage_2"], "class_embed_type": "timestep",
    "time_embedding_dim": 32, "time_embedding_act_fn": "gelu", "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142271248762552, "mid_block_scale_factor": 1.4142271248762552,
}  # fmt: skip
UNET_THREE: dict[str, Any] = {
    "act_fn": "silu", "attention_head_dim": 4, "block_out_channels": [16, 32], "center_input_sample": False,
    "cross_attention_dim": 32, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
    "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 7, "layers_per_block": 1,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 8, "num_class_embeds": 1000,
    "only_cross_attention": [True, False], "out_channels": 4, "sample_size": SIDES["stage_3"] // 4,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
VAE: dict[str, Any] = {
    "act_fn": "silu", "block_out_channels": [8, 8, 16], "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "out_channels": 3,
    "sample_size": 256, "scaling_factor": 0.08333, "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip
