"""Transformers models that must be served: every row equals what the row gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import fastlora
from fastlora.modules.trained import find_trained_layers
from tests.support.models import error, quiet, randomise_lora
from tests.support.serving.row_servers import (
    BART,
    CONFIG,
    DECODER,
    IMAGE,
    IMAGE_TOKEN,
    TEXT,
    VOCABULARY,
    Served,
    build_with_fixed_weights,
    llava,
    qwen2_5_vl,
    two_images_and_none,
    whisper,
)

pytestmark = quiet
B = 3


def ids(length: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (B, length))


def text() -> dict[str, Tensor]:
    mask = torch.ones(B, 6, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def labelled() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": ids(5)}


def answered() -> dict[str, Tensor]:
    return {"input_ids": ids(8), "decoder_input_ids": ids(5)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(B, 3, 16, 16)}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(B, 200)}


def _of(model: str, config: str, sizes: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, model)(getattr(tf, config)(**sizes))


T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None, "initializer_factor": 2.0,
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
WAVE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (4, 4), "vocab_size": VOCABULARY,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
EXPERTS = DECODER | {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
MEL = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
PAIR = {
    "text_config": TEXT | {"eos_token_id": 1, "projection_dim": 32, "projection_size": 32},
    "vision_config": IMAGE | {"projection_dim": 32},
}  # fmt: skip


def blip_like() -> nn.Module:
    parts = tf.ViTConfig(**IMAGE), tf.GPT2Config(**GPT, add_cross_attention=True, is_decoder=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    return tf.VisionEncoderDecoderModel(config)


# {model: (how it is built, what it is given)}
MUST: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "BERT": (_of("BertForMaskedLM", "BertConfig", TEXT), text),
    "RoBERTa": (_of("RobertaForSequenceClassification", "RobertaConfig", TEXT), text),
    "ModernBERT": (
        _of("ModernBertForMaskedLM", "ModernBertConfig",
            TEXT | {"cls_token_id": 2, "sep_token_id": 3}),
        text,
    ),
    "XLNet": (  # its layers have the batch in their second dimension, here as long as the first
        _of("XLNetForSequenceClassification", "XLNetConfig", XLNET),
        lambda: {"input_ids": ids(B)},
    ),
    "ViT": (_of("ViTForImageClassification", "ViTConfig", IMAGE), images),
    "Swin": (_of("SwinForImageClassification", "SwinConfig", SWIN), images),
    "CLIP's texts": (
        _of("CLIPTextModelWithProjection", "CLIPTextConfig", PAIR["text_config"]), text,
    ),
    "CLIP's images": (_of("CLIPVisionModel", "CLIPVisionConfig", IMAGE), images),
    "T5": (_of("T5ForConditionalGeneration", "T5Config", T5), labelled),
    "BART": (_of("BartForConditionalGeneration", "BartConfig", BART), labelled),
    "Whisper": (
        _of("WhisperForConditionalGeneration", "WhisperConfig", BART | MEL),
        lambda: {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": ids(4)},
    ),
    "Wav2Vec2": (_of("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVE), sound),
    "GPT-2": (_of("GPT2LMHeadModel", "GPT2Config", GPT), text),
    "BLOOM": (
        _of("BloomForCausalLM", "BloomConfig",
            {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        text,
    ),
    "VisionEncoderDecoder": (
        blip_like,
        lambda: images() | {"decoder_input_ids": ids(5)},
    ),
    "Mixtral": (_of("MixtralForCausalLM", "MixtralConfig", EXPERTS), text),
}  # fmt: skip
MUST |= {
    name: (_of(f"{name}ForCausalLM", f"{config or name}Config", DECODER), text)
    for name, config in {
        "Llama": "", "Mistral": "", "Qwen2": "", "Qwen3": "", "Gemma": "", "Gemma2": "",
        "Gemma3": "Gemma3Text", "Phi3": "", "GPTNeoX": "",
    }.items()
}  # fmt: skip
# The other tests of the suite serve others already.
QUICK = ("XLNet", "ViT", "BART", "Mixtral")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in MUST]
)
def test_served_row_equals_the_row_alone(name, tmp_path):
    build, inputs = MUST[name]
    served = Served(build, tmp_path)
    for _ in range(2):  # the second time by what was found the first time
        served.agrees(inputs(), ["alice", "bob", None])


@pytest.mark.parametrize("beams", [1, 2])
def test_llava_serves_prompts_with_uneven_images(beams, tmp_path):
    """The tower has as many images as the batch has rows, all of them the first one's."""
    served, (tokens, seen) = Served(llava, tmp_path), two_images_and_none()
    server, names, mask = served.server, ["alice", "bob"], torch.ones_like(tokens)
    both: list[dict[str, Tensor]] = [{"pixel_values": seen}, {}]
    parts = [
        {"input_ids": tokens[i : i + 1], "attention_mask": mask[i : i + 1]} | more
        for i, more in enumerate(both)
    ]
    given = {"input_ids": tokens, "attention_mask": mask, "pixel_values": seen}
    if beams == 1:
        out = server(**given, adapter_names=names).logits
        for i, name in enumerate(names):
            with torch.no_grad():
                assert error(out[i : i + 1], served.alone[name](**parts[i]).logits) < 1e-5
        # An image fewer: the same shapes as before, another owner.
        other = torch.cat([tokens[1:], tokens[:1]])
        turned = server(input_ids=other, pixel_values=seen, adapter_names=names).logits
        with torch.no_grad():
            want = served.alone["bob"](input_ids=other[1:], pixel_values=seen).logits
        assert error(turned[1:], want) < 1e-5
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    if beams > 1:  # transformers repeats images one by one: a prompt's beams want one image
        tokens[0, 4:8] = 3
        parts[0]["pixel_values"] = given["pixel_values"] = seen[:1]
        parts[0]["input_ids"] = tokens[:1]
        options["num_beams"] = beams
    got = server.generate(**given, adapter_names=names, **options)
    for i, name in enumerate(names):
        assert torch.equal(got[i : i + 1], served.alone[name].generate(**parts[i], **options))


def test_llava_training_gives_others_no_gradient():
    tokens, seen = two_images_and_none()
    model = fastlora.replace_linear(
        build_with_fixed_weights(llava), CONFIG, adapter_names=["alice", "bob"]
    )
    randomise_lora(model)
    with fastlora.use_adapters(model, ["alice", "bob"]):
        out = model(input_ids=tokens, pixel_values=seen).logits
        out[0].square().mean().backward()
    towers = [layer for name, layer in find_trained_layers(model) if "vision" in name]
    for name, some in (("alice", True), ("bob", False)):
        factors = [p for layer in towers for p in layer.adapter_parameters(name).values()]
        assert any(bool(p.grad is not None and p.grad.any()) for p in factors) == some


def test_qwen_serves_images_of_any_size(tmp_path):
    served, names = Served(qwen2_5_vl, tmp_path), ["alice", "bob", None]

    def line(*sizes: int) -> list[int]:
        found = [token for n in sizes for token in (92, *[IMAGE_TOKEN] * n, 93)]
        return [*found, *range(5, 25 - len(found))]

    tokens = torch.tensor([line(4, 8), line(8), line()])
    grid = torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 8]])
    seen, kinds = torch.randn(16 + 32 + 32, 3 * 2 * 4 * 4), (tokens == IMAGE_TOKEN).int()
    out = served.server(
        input_ids=tokens, mm_token_type_ids=kinds, pixel_values=seen, image_grid_thw=grid,
        adapter_names=names,
    ).logits  # fmt: skip
    mine: list[Any] = [
        {"pixel_values": seen[:48], "image_grid_thw": grid[:2]},
        {"pixel_values": seen[48:], "image_grid_thw": grid[2:]},
        {},
    ]
    for i, name in enumerate(names):
        part = {"input_ids": tokens[i : i + 1], "mm_token_type_ids": kinds[i : i + 1]} | mine[i]
        with torch.no_grad():
            assert error(out[i : i + 1], served.alone[name](**part).logits) < 1e-4


WAYS: dict[str, dict[str, Any]] = {
    "long, beams": {"num_beams": 2, "return_timestamps": True},
    "long": {"return_timestamps": True},
    "long, what was said before": {
        "num_beams": 2, "return_timestamps": True, "condition_on_prev_tokens": True,
    },
    "short": {},
    "beams and several texts": {"num_beams": 2, "num_return_sequences": 2},
}  # fmt: skip


@pytest.mark.parametrize("way", [
    way if i in (0, 4) else pytest.param(way, marks=pytest.mark.full) for i, way in enumerate(WAYS)
])  # fmt: skip
def test_whisper_serves_rows_that_finish_early(way, tmp_path):
    """Beside audio of other lengths, whoever's it is, as beside audio of one's own."""
    served, names = Served(whisper, tmp_path), ["alice", "bob", "alice"]
    torch.manual_seed(3)
    given = {"input_features": torch.randn(B, 8, 60 if "long" in way else 20)}
    if "long" in way:
        mask = torch.ones(B, 60, dtype=torch.long)
        mask[0, 25:] = mask[2, 45:] = 0
        given["attention_mask"] = mask
    options = WAYS[way] | {"max_new_tokens": 5}
    got = served.server.generate(**given, adapter_names=names, **options)
    n = len(got) // B
    for name in ("alice", "bob"):
        want = served.alone[name].generate(**given, **options)
        for i in (i for i in range(B * n) if names[i // n] == name):
            length = min(got.shape[1], want.shape[1])
            assert torch.equal(got[i, :length], want[i, :length])
            assert not got[i, length:].any()
            assert not want[i, length:].any()


def test_clip_images_need_loss_or_stated_rows(tmp_path):
    """CLIP scores every pair: whose an image is nobody says by giving as many of both."""
    served = Served(_of("CLIPModel", "CLIPConfig", PAIR), tmp_path)
    given, names = text() | images(), ["alice", "bob", None]
    with pytest.raises(RuntimeError, match=r"vision_model.*is not known.*adapter_rows"):
        served.server(**given, adapter_names=names)
    paired = served.server(**given, adapter_names=names, return_loss=True)
    stated = served.server(**given, adapter_names=names, adapter_rows={"vision_model": [2, 1, 0]})
    for i, name in enumerate(names):
        alone, other = (
            served.alone[each](**{k: t[i : i + 1] for k, t in given.items()})
            for each in (name, names[2 - i])
        )
        assert error(paired.text_embeds[i], alone.text_embeds[0]) < 1e-4
        assert error(paired.image_embeds[i], alone.image_embeds[0]) < 1e-4
        assert error(stated.image_embeds[i], other.image_embeds[0]) < 1e-4
