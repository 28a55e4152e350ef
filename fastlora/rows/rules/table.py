"""Table of the rules of torch's ops.

An op without a rule gives its results to several rows at once, which every layer refuses.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.rows.rules import computing
from fastlora.rows.rules.indexing import INDEXING
from fastlora.rows.rules.moving import MOVING
from fastlora.rows.rules.op import Rule, assign

_RULES: dict[str, Rule] = {
    **MOVING,
    **INDEXING,
    **assign(
        computing.keep_first,
        "clone detach alias lift lift_fresh lift_fresh_copy _to_copy contiguous dropout bernoulli "
        "zero_ fill_ normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ tril triu tril_ "
        "triu_ _conj _conj_physical resolve_conj resolve_neg detach_ requires_grad_ isin bucketize "
        "pin_memory _pin_memory to_mkldnn celu nan_to_num_",
    ),
    **assign(computing.keep_first_in_all, "native_dropout _fused_dropout"),
    **assign(
        computing.disown,
        "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
        "new_ones new_empty new_full new_empty_strided _assert_async _assert_scalar sym_size "
        "_assert_tensor_metadata _local_scalar_dense equal is_nonzero is_same_size",
    ),
    **assign(
        computing.reduce,
        "sum mean amax amin max min any all argmax argmin logsumexp var std var_mean std_mean prod "
        "norm linalg_vector_norm median nanmedian aminmax nansum count_nonzero",
    ),
    **assign(
        computing.join_dim,
        "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod cumsum_ "
        "cummax cummin glu logcumsumexp",
    ),
    **assign(computing.transform, "_fft_r2c _fft_c2r _fft_c2c"),
    **assign(computing.normalise, "native_layer_norm _fused_rms_norm layer_norm rms_norm"),
    **assign(computing.normalise_groups, "native_group_norm"),
    **assign(
        computing.normalise_batch,
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update batch_norm",
    ),
    **assign(
        computing.convolve,
        "convolution _convolution mkldnn_convolution cudnn_convolution _slow_conv2d_forward "
        "slow_conv3d_forward conv_depthwise3d _conv_depthwise2d thnn_conv2d "
        "convolution_overrideable cudnn_convolution_transpose conv1d conv2d conv3d "
        "conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d "
        "max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d max_pool3d "
        "mkldnn_max_pool2d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d "
        "adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
        "replication_pad1d replication_pad2d replication_pad3d im2col col2im pixel_shuffle "
        "pixel_unshuffle channel_shuffle native_channel_shuffle",
    ),
    **assign(computing.multiply, "mm bmm addmm baddbmm addmm_ baddbmm_ _addmm_activation"),
    **assign(computing.multiply_linear, "linear mkldnn_linear _mkl_linear"),
    **assign(computing.multiply_vector, "mv"),
    **assign(
        computing.multiply_rows,
        "_grouped_mm _scaled_mm _weight_int4pack_mm _weight_int8pack_mm _int_mm",
    ),
    **assign(
        computing.attend,
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    **assign(computing.recur, "mkldnn_rnn_layer _cudnn_rnn miopen_rnn"),
    **assign(computing.run_cell, "_thnn_fused_lstm_cell _thnn_fused_gru_cell"),
    **assign(computing.sample, "multinomial"),
    **assign(computing.pair_complex, "view_as_real view_as_complex"),
    **assign(computing.look_up, "embedding"),
    **assign(
        computing.run_bitsandbytes,
        "gemm_4bit gemv_4bit int8_linear_matmul int8_scaled_mm int8_mixed_scaled_mm "
        "int8_mm_dequant int8_vectorwise_quant",
        "bitsandbytes",
    ),
}
# By their tag; these lack it in some torch.
for _name in (
    "rrelu_with_noise",
    "_prelu_kernel",
    "lerp",
    "where",
    "masked_fill",
    "hardtanh",
    "floor_divide",
    "floor_divide_",
    "remainder",
):
    _RULES.setdefault(f"aten::{_name}", computing.join_elements)


def find_rule(func: Any) -> Rule | None:
    """Finds an op's rule; None where it is to be taken apart, if it can be."""
    name = func._schema.name
    if name.startswith("fastlora::"):
        return computing.run_fastlora
    if name in ("aten::max", "aten::min") and func._overloadname in ("other", "out"):
        return computing.join_elements
    rule = _RULES.get(name)
    if rule is None and name.endswith("_"):
        rule = _RULES.get(name[:-1])
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = computing.join_elements
    return rule
