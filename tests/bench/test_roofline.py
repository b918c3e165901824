"""The model of the hardware: cases that can be worked out by hand, and what it must agree with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from mgrpo.bench.kernels import targets
from mgrpo.bench.roofline import run
from mgrpo.bench.roofline.chips import B200, CHIPS, EXPOSED, FILL, H100, H200, HOST, KERNEL, STREAM, Chip
from mgrpo.bench.roofline.head import HeadCase, bare, head, memory, over_bare, quarter, row_pass
from mgrpo.bench.roofline.layers import eager_layer, fused_layer
from mgrpo.bench.roofline.step import MODELS, StepCase, parameters, step, tokens_per_second, useful_flop
from mgrpo.bench.step.models import QWEN3_06B, flop
from mgrpo.kernels.triton.buffers import LEAST_BYTES, MOST_BYTES

TEN = Chip("ten processors", 1e14, 1e12, 0, 10, 1e-6, (1e14, 1e14))
LARGE = HeadCase(8192, 4096, 151_936)


def test_a_matmul_of_many_tiles_takes_their_waves() -> None:
    """1280 x 2560 is 100 tiles, so 10 waves; each tile of K = 1000 is 65.5 Mflop at 10 Tflop/s a processor."""
    waves = 10 * (2 * 128 * 256 * 1000 / 1e13 + FILL)
    moved = 2 * 1000 * (1280 + 2560) + 2 * 1280 * 2560
    assert TEN.matmul(1280, 2560, 1000) == pytest.approx(KERNEL + waves + EXPOSED * moved / (STREAM * 1e12))


def test_a_matmul_of_short_sums_takes_its_traffic() -> None:
    """With K = 32 an added float32 result, read and written, takes longer than its flop."""
    moved = 2 * 32 * (1280 + 2560) + 8 * 1280 * 2560
    tiles = 10 * (2 * 128 * 256 * 32 / 1e13 + FILL)
    added = TEN.matmul(1280, 2560, 32, out=4, add=True)
    assert added == pytest.approx(KERNEL + moved / (STREAM * 1e12) + EXPOSED * tiles)
    assert TEN.matmul(1280, 2560, 32, out=4) < added


def test_a_single_tile_is_split_over_the_processors() -> None:
    one = 2 * 128 * 256 * 1_000_000 / 1e13
    assert one / 8 < TEN.matmul(128, 256, 1_000_000) < one / 6


def test_a_pass_needs_enough_bytes_on_their_way() -> None:
    assert TEN.stream(9e8) == pytest.approx(KERNEL + 1e-3)
    assert TEN.rows(9e8, 90_000) == pytest.approx(KERNEL + 1e-3), "10 x 90 KB in 1 us are 0.9 TB/s"
    assert TEN.rows(9e8, 45_000) == pytest.approx(KERNEL + 2e-3)
    assert row_pass(TEN, 100, 9000, 4) == pytest.approx(TEN.rows(100 * 9000 * 10, 64 << 10)), "no cache, no reuse"


def test_without_the_passes_the_head_is_its_three_matmuls() -> None:
    swift = replace(H100, bandwidth=1e18, latency=1e-15)
    assert over_bare(swift, LARGE) == pytest.approx(1, abs=0.02)
    parts = head(swift, LARGE)
    assert sum(parts[name] for name in ("logits", "dX", "dW")) == pytest.approx(bare(swift, LARGE), rel=0.02)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (replace(LARGE, buffers=LEAST_BYTES), (1.37, 1.22, 1.34)),
        (LARGE, (1.14, 1.10, 1.13)),
        (replace(LARGE, epilogue=True), (1.06, 1.06, 1.06)),
    ],
    ids=["least buffers", "most buffers", "epilogue"],
)
def test_it_agrees_with_an_earlier_model(case: HeadCase, wanted: tuple[float, ...]) -> None:
    """Compare the head with the figures of a spreadsheet that was made before, by other formulas."""
    for chip, ratio in zip((H100, H200, B200), wanted, strict=True):
        assert over_bare(chip, case) == pytest.approx(ratio, abs=0.035), chip.name


def test_the_head_follows_its_settings() -> None:
    assert memory(LARGE) == MOST_BYTES + 4 * 4096 * 151_936 + 2 * 8192 * 4096
    assert memory(LARGE) - memory(replace(LARGE, master=True)) == 4 * 4096 * 151_936
    for chip in CHIPS:
        assert over_bare(chip, replace(LARGE, master=True)) < over_bare(chip, LARGE)
        assert 0.25 < quarter(chip, LARGE) < 0.3
        assert over_bare(chip, replace(LARGE, parts=4)) > over_bare(chip, LARGE)
        assert over_bare(chip, replace(LARGE, live=0.5)) < 0.6 * over_bare(chip, LARGE)
    assert sum(head(H100, replace(LARGE, live=0.0)).values()) < 0.1 * sum(head(H100, LARGE).values())


def test_a_layer_is_counted_as_it_is_written() -> None:
    """Two norms of the width and two of the heads, RoPE, SwiGLU and two sums, as transformers 5.24 writes them."""
    short, long = eager_layer(QWEN3_06B, 128), eager_layer(QWEN3_06B, 256)
    assert short.launches == long.launches and 100 < short.launches < 180
    assert long.moved / short.moved == pytest.approx(2, rel=0.1)
    fused = fused_layer(QWEN3_06B, 128)
    assert fused.moved < short.moved / 4 and fused.launches < short.launches / 4
    norm = 10 * 1024 + 10 * 128 * 24  # bytes of a token: both norms of the width are counted by hand here
    assert fused.moved > 128 * norm


def test_models_and_their_flop_are_the_real_ones() -> None:
    case = StepCase(QWEN3_06B, 16384, 4096, live=0.5, batches=3)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN3_06B), dtype=torch.bfloat16)
        assert useful_flop(case) == pytest.approx(3 * flop(model, [4096] * 4, 8192))
        assert parameters(QWEN3_06B) == sum(w.numel() for w in model.parameters() if w.dim() == 2)
    assert [round(parameters(sizes) / 1e9, 1) for sizes in MODELS.values()] == [0.6, 4.0, 8.2]


def test_a_step_is_the_sum_of_its_parts() -> None:
    eager, fused = (step(H100, StepCase(QWEN3_06B, 16384, 2048, fused=fused)) for fused in (False, True))
    changed = {name for name in eager if eager[name] != fused[name]}
    assert changed == {"norms, RoPE, SwiGLU, sums"}
    case = StepCase(QWEN3_06B, 16384, 2048)
    assert tokens_per_second(case, {"all": 2.0}) == 8 * 16384 / 2
    longer = step(H100, replace(case, length=4096))
    assert longer["attention"] == pytest.approx(2 * eager["attention"], rel=0.01)
    flat = 28 * 16 * 128 * 16384 * 2048  # flop of one causal matmul in every layer
    work = 8 * (2 * flat / 350e12 + 5 * flat / 280e12)
    assert eager["attention"] == pytest.approx(work, rel=0.01)


def test_few_tokens_leave_the_step_to_the_host() -> None:
    parts = step(H100, StepCase(QWEN3_06B, 64, 64))
    assert parts["host"] > 0.3 * sum(parts.values())
    assert sum(parts.values()) > HOST * 8 * 28 * 138


def test_a_measurement_of_the_same_name_stands_beside_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = targets.GEMMS.name
    kept = [{"name": name, "value": 1.3, "unit": "x"}, {"name": "other", "value": None, "unit": "x"}]
    line = {"bench": "kernels", "commit": "c", "machine": "NVIDIA H200, 139 GiB", "results": kept}
    (tmp_path / "gpu-kernels.json").write_text(json.dumps(line) + "\n")
    found = run.measured(tmp_path)
    assert found == {name: "1.3 on NVIDIA H200"}
    results = run.present("title", [run.Row(name, "x", (1.0, 2.0, 3.0))], found)
    assert [(r.name, r.value) for r in results][1] == (f"H200, {name}", 2.0)
    assert "x 1.3 on NVIDIA H200" in " ".join(capsys.readouterr().out.split())


def test_the_command_prints_all_and_writes_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(True, tmp_path / "roofline.json")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "roofline.json").read_text())
    names = {result["name"] for result in last["results"]}
    assert len(names) == len(last["results"]) and all(result["value"] is not None for result in last["results"])
    assert {f"H200, {t.name}" for t in (targets.GEMMS, targets.MEMORY, targets.QUARTER, targets.BANDWIDTH)} <= names
    assert "B200, matmuls: 256 rows, G^T X, added" in names
