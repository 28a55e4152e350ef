"""A patched PEFT model with an adapter per row gives the numbers of the unpatched one."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


import fastlora  # noqa: E402
from tests.support.models import assert_agree, quiet  # noqa: E402
from tests.support.patched import (  # noqa: E402
    KINDS,
    add_second_adapter,
    assert_same,
    config,
    count_forwards,
    fill_adapters,
    inputs,
    pair,
    run,
)
from tests.support.serving.row_servers import build_with_fixed_weights, llava, two_images_and_none  # noqa: E402

pytestmark = quiet


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_per_row_matches_peft(kind, monkeypatch):
    given = inputs(kind, rows=6)
    rows = ["other", "default", "__base__", "third", "other", "default"]
    plain, patched = pair(kind)
    for model in (plain, patched):
        model.add_adapter("other", config(kind, r=9, lora_alpha=20))
        model.add_adapter("third", config(kind, target_modules=config(kind).target_modules, r=1))
        fill_adapters(model).eval()
    with count_forwards(monkeypatch) as counts, torch.no_grad():
        got, want = (run(m, given, adapter_names=rows) for m in (patched, plain))
        layers = counts["many"]
    assert_agree(got, want)
    assert layers == len(fastlora.report(patched).replaced)
    # Each row is what its adapter alone makes of it, and no two adapters agree.
    with torch.no_grad():
        for name in ("default", "other", "third"):
            patched.set_adapter(name)
            alone = run(patched, given)
            mine = [i for i, row in enumerate(rows) if row == name]
            assert_agree(got[mine], alone[mine])


def test_base_name_is_never_taken_for_an_adapter():
    plain, patched = pair("mlp")
    for model in (plain, patched):
        model.add_adapter("__base__", config("mlp"))
        fill_adapters(model).eval()
    rows = ["__base__", "default", "__base__"]
    given = inputs("mlp", rows=3)
    with torch.no_grad():
        assert_agree(*(run(m, given, adapter_names=rows) for m in (patched, plain)))


def test_adapter_per_row_matches_peft_on_triton(on_triton, device):
    plain, patched = pair("mlp", lora_dropout=0.1)
    for model in (plain, patched):
        model.add_adapter("other", config("mlp", r=3))
        fill_adapters(model).eval().to(device)
    given = {"x": inputs("mlp", rows=3)["x"].to(device)}
    with torch.no_grad():
        assert_agree(run(patched, given), run(plain, given))
        for rows in (["other", "__base__", "default"], ["__base__"] * 3):
            got, want = (run(m, given, adapter_names=rows) for m in (patched, plain))
            assert_agree(got, want)


def test_adapter_per_row_matches_gradients_of_peft():
    plain, patched = pair("mlp")
    x = torch.randn(3, 11)
    rows = ["default", "__base__", "other"]

    def act(model):
        add_second_adapter(model)
        model.base_model.set_adapter(["default", "other"])
        out = run(model, {"x": x}, adapter_names=rows)
        out.square().sum().backward()
        return [out]

    assert_same(plain, patched, act)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        run(patched, {"x": x}, adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        run(patched, {"x": x}, adapter_names=["default", "nobody", "other"])
    patched.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        run(patched, {"x": x}, adapter_names=rows)


def test_tensors_of_a_transform_do_not_leak():
    """torch.func wraps tensors; kept, they would be met by every later batch of these rows."""
    found, rows, x = [], ["default", "__base__"], torch.randn(2, 11)
    for model in pair("mlp"):
        layer = model.base_model.model.lin0

        def one(x, layer=layer):
            return layer(x, adapter_names=rows)

        # Not a transform that autograd's own Functions go through.
        with contextlib.suppress(RuntimeError):
            torch.func.functionalize(one)(x)
        found.append(one(x))
    assert_agree(found[1], found[0])


def test_vision_tower_rows_are_no_batch_rows():
    """PEFT itself goes by their number: two images of the first text, beside another's text."""
    model = peft.get_peft_model(
        build_with_fixed_weights(llava),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"]),
    )
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    plain = fill_adapters(model).eval()
    (tokens_of, seen), rows = two_images_and_none(), ["default", "other"]
    with torch.no_grad():
        want = plain(input_ids=tokens_of[:1], pixel_values=seen).logits
        theirs = plain(input_ids=tokens_of, pixel_values=seen, adapter_names=rows).logits[:1]
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in plain.modules()]
        fastlora.patch_peft(plain)
        got = plain(input_ids=tokens_of, pixel_values=seen, adapter_names=rows).logits[:1]
        assert_agree(got, want, theirs)
        # Where nobody knows, it is refused.
        given = {"pixel_values": seen, "image_sizes": torch.tensor([[16, 16]] * 2)}
        with pytest.raises(RuntimeError, match=r"vision_tower.*whose the rows of its input"):
            plain(input_ids=tokens_of, **given, adapter_names=rows)
        fastlora.unpatch_peft(plain)
        again = plain(input_ids=tokens_of, pixel_values=seen, adapter_names=rows).logits[:1]
        assert torch.equal(again, theirs)
        assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in plain.modules()] == hooks


def test_generate_with_adapter_per_row_matches_peft():
    plain, patched = pair("llama")
    given = {"input_ids": inputs("llama", rows=3)["input_ids"]}
    more = {"max_new_tokens": 5, "num_beams": 2, "pad_token_id": 0, "do_sample": False}
    for model in (plain, patched):
        model.add_adapter("other", config("llama", r=2))
        fill_adapters(model).eval()
    rows = ["other", "__base__", "default"]
    masks = {"attention_mask": torch.ones_like(given["input_ids"])}
    found = [m.generate(**given, **masks, **more, adapter_names=rows) for m in (plain, patched)]
    assert torch.equal(*found)
    found = [m.generate(**given, **masks, **more) for m in (plain, patched)]
    assert torch.equal(*found)


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
def test_failed_batch_leaves_no_adapter_names(error):
    """As it does in PEFT, where the active adapter then has no say."""
    plain, patched = pair("mlp")
    found = []
    for model in (plain, patched):
        model.add_adapter("other", config("mlp"))
        fill_adapters(model).eval()

        def fail(*args, raised=error):
            raise raised

        given = inputs("mlp", rows=3)
        with torch.no_grad():
            want = run(model, given)
            handle = model.base_model.model.register_forward_hook(fail)
            with pytest.raises(error):
                run(model, given, adapter_names=["other"] * 3)
            handle.remove()
            found.append(torch.equal(run(model, given), want))
    assert found == [False, True]


def test_adapter_names_are_separate_for_each_thread():
    """PEFT hangs each batch's names on the layers, where all threads find them."""
    _, patched = pair("mlp")
    patched.add_adapter("other", config("mlp"))
    fill_adapters(patched).eval()
    given, wrong = inputs("mlp", rows=3), []
    with torch.no_grad():
        want = {
            name: run(patched, given, adapter_names=[name] * 3) for name in ("default", "other")
        }

    def work(name: str) -> None:
        with torch.no_grad():
            rows = [name, "__base__", name]
            for _ in range(20):
                got = run(patched, given, adapter_names=rows)
                if not torch.allclose(got[::2], want[name][::2], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
