"""The profile of a step: parts, kinds, FLOPs and bytes of a small program by hand, and the page that shows them."""

import json

import pytest

from clip_jax.commands import main
from clip_jax.devices.hardware import tpu
from clip_jax.planning import compiling
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.cycles import estimate
from clip_jax.planning.profile import Share, with_kernels

BLOCK = "jit(train_step)/transpose(jvp(ViT))/transformer/while/body/closed_call/checkpoint/blocks"
KERNEL = "bf16[2,100,128] bf16[2,100,128] bf16[2,100,128] -> bf16[2,100,128]"


def line(name, shape, call, op_name, cycles):
    known = f', backend_config={{"estimated_cycles":"{cycles}"}}' if cycles else ""
    return f'  %{name} = {shape} {call}, metadata={{op_name="{op_name}"}}{known}'


PROGRAM = "\n".join(
    [
        "HloModule jit_step, is_scheduled=true",
        "",
        "%product (p: bf16[2,100,128], w: bf16[128,512,1]) -> bf16[2,100,512] {",
        "  %p = bf16[2,100,128]{2,1,0} parameter(0)",
        "  %w = bf16[128,512,1]{1,0,2} parameter(1)",
        "  ROOT %convolution = bf16[2,100,512]{2,1,0} convolution(%p, %w), window={size=1}, dim_labels=b0f_io0->b0f",
        "}",
        "",
        "%update (q: f32[12,8], r: f32[1,8], i: s32[]) -> f32[12,8] {",
        "  %q = f32[12,8]{1,0} parameter(0)",
        "  %r = f32[1,8]{1,0} parameter(1)",
        "  %i = s32[] parameter(2)",
        "  ROOT %dus = f32[12,8]{1,0} dynamic-update-slice(%q, %r, %i, %i)",
        "}",
        "",
        "ENTRY %main (x: bf16[2,100,128], y: bf16[128,512,1], z: f32[12,8], u: f32[1,8], j: s32[]) -> f32[12,8] {",
        "  %x = bf16[2,100,128]{2,1,0:T(8,128)(2,1)} parameter(0)",
        "  %y = bf16[128,512,1]{1,0,2:T(8,128)S(1)} parameter(1)",
        "  %z = f32[12,8]{1,0} parameter(2)",
        "  %u = f32[1,8]{1,0} parameter(3)",
        "  %j = s32[] parameter(4)",
        line("a", "bf16[2,100,512]{2,1,0}", "fusion(%x, %y), kind=kOutput, calls=%product",
             f"{BLOCK}/mlp/...w,wm->...m/dot_general", 700),
        line("b", "bf16[2,100,128]{2,1,0}", "add(%x, %x)", f"{BLOCK}/norm_1/reduce_sum", 30),
        line("c", "bf16[2,100,128]{1,2,0}", "copy(%b)", "", 20),
        line("d", "bf16[2,100,128]{2,1,0}", 'custom-call(%x, %x, %x), custom_call_target="tpu_custom_call"',
             f"{BLOCK}/attention/pallas_call", None),
        line("e", "f32[12,8]{1,0}", "fusion(%z, %u, %j), kind=kLoop, calls=%update",
             f"{BLOCK[:46]}/while/body/dynamic_update_slice", 10),
        line("f", "f32[12,8]{1,0}", "multiply(%e, %e)", "jit(train_step)/optimizer/mul", 5),
        line("g", "f32[12,8]{1,0}", "multiply(%e, %e)", "jit(train_step)/jvp(objective.contrastive)/mul", 4),
        line("h", "f32[12,8]{1,0}", "multiply(%e, %e)", "jit(train_step)/jvp(objective.captioning)/mul", 3),
        line("k", "f32[12,8]{1,0}", "exponential(%e)", f"{BLOCK}/attention/exp", 2),
        "  ROOT %end = f32[12,8]{1,0} copy(%h)",
        "}",
    ]
)  # fmt: skip


def test_a_program_is_sorted_by_part_and_kind_with_its_flops_and_bytes():
    found = {(s.part, s.kind): s for s in estimate(PROGRAM).profile}
    assert {key: s.cycles for key, s in found.items()} == {
        ("image tower", "matrix products"): 700,
        ("image tower", "norms"): 30,
        ("rest of the step", "saves and copies"): 20,
        ("image tower", "attention kernel"): 0,
        ("image tower", "saves and copies"): 10,
        ("optimizer", "optimizer"): 5,
        ("contrastive", "contrastive loss"): 4,
        ("captioning", "vocabulary loss"): 3,
        ("image tower", "element-wise"): 2,
    }
    product = found["image tower", "matrix products"]
    assert product.flops == 2 * 2 * 100 * 128 * 512
    assert product.hbm_bytes == 2 * (2 * 100 * 128 + 2 * 100 * 512)  # the weight lies in fast memory
    kernel = found["image tower", "attention kernel"]
    assert kernel.flops == 2 * 2 * (2 * 100 * 100 * 128) and kernel.kernels == {KERNEL: 1}
    # One row is read and written, not the array that it belongs to; the index is 4 bytes.
    assert found["image tower", "saves and copies"].hbm_bytes == 2 * 4 * 8 + 4
    filled = {(s.part, s.kind): s.cycles for s in with_kernels(found.values(), {KERNEL: 50})}
    assert filled["image tower", "attention kernel"] == 50


def test_what_xla_computes_of_the_attention_is_scores():
    found = {(s.part, s.kind): s.cycles for s in estimate(PROGRAM.replace("tpu_custom_call", "other")).profile}
    assert found["image tower", "attention scores"] == 2


def test_a_batched_product_counts_each_entry_of_the_batch_once():
    # How the TPU compiler writes 12 products of a batch: a spatial axis whose dilation lets one tap in.
    text = PROGRAM.replace("window={size=1}, dim_labels=b0f_io0->b0f", "WINDOW").replace("[2,100,128]", "[12,100,128]")
    text = text.replace("bf16[128,512,1]", "bf16[12,128,512]").replace("bf16[2,100,512]", "bf16[12,100,512]")
    window = "window={size=12 stride=11 pad=0_0 lhs_dilate=12}, dim_labels=0bf_0io->0bf"
    (share,) = (s for s in estimate(text.replace("WINDOW", window)).profile if s.kind == "matrix products")
    assert share.flops == 12 * 2 * 100 * 128 * 512


@pytest.fixture
def compiled(monkeypatch):
    free = tpu("v5e-256").chip.free_hbm_per_device
    shares = (
        Share("image tower", "matrix products", 1_200_000_000, 10**14, 10**9, {}),
        Share("text tower", "norms <b>", 303_000_000, 0, 10**9, {}),
    )
    answer = Compiled(True, free // 2, free, 1.0, cycles=1_503_000_000, profile=shares)
    monkeypatch.setattr(compiling, "is_installed", lambda: True)
    monkeypatch.setattr(compiling, "version", lambda: "0.0.42")
    monkeypatch.setattr(compiling, "compile_step", lambda *_: answer)


PLAN = ["plan", "--config=configs/clip_vit_l14.py", "--tpu=v5e-256"]


def test_the_profile_is_printed_written_as_a_page_and_part_of_the_json(compiled, tmp_path, capsys):
    page = tmp_path / "profile.html"
    assert main([*PLAN, f"--profile={page}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "image tower matrix products 798.4 ms 79.8% at least 507.6 ms" in printed
    assert page.read_text().count("<rect") == 3 and "norms &lt;b&gt;" in page.read_text()  # the third: collectives
    assert main([*PLAN, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["profile"][0]
    assert first["milliseconds"] == pytest.approx(798.4, abs=0.1) and first["share"] == pytest.approx(1200 / 1503)


def test_a_profile_without_the_compiler_is_one_line(capsys):
    assert main([*PLAN, "--estimate", "--profile"]) == 2
    assert "--profile reads the TPU compiler's program" in capsys.readouterr().err
